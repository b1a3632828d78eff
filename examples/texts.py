"""What the examples on text share."""

import gzip
import logging
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten
from typing import Any

import lightning as L
import torch
from tokenizers import ByteLevelBPETokenizer, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def prepare(out: Path) -> Path:
    """Settle what every example needs; returns a new folder for this run."""
    torch.set_num_threads(1)  # the models are too small to share
    warnings.filterwarnings("ignore", ".*LeafSpec.*|.*does not have many workers.*")  # Lightning's own
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")  # between Transformers and PEFT
    said_of_every_trainer = ("GPU available", "TPU available", "💡", "`Trainer.fit` stopped")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(said_of_every_trainer)
    )
    L.seed_everything(0, verbose=False)
    return out / time.strftime("%Y%m%d-%H%M%S")


def make_trainer(max_epochs: int, callbacks: Iterable[L.Callback] = ()) -> L.Trainer:
    """A quiet Trainer."""
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return L.Trainer(accelerator="cpu", max_epochs=max_epochs, callbacks=list(callbacks), **quiet)


def read_text(path: Path) -> str:
    """A text file, which may be compressed by gzip."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding learnt from some texts; special tokens surround texts and pairs of them as in BERT."""
    special = ["[PAD]", "[CLS]", "[SEP]"]
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts, vocab_size, special_tokens=special, show_progress=False)
    learnt.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = dict(zip(("pad_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, model_max_length=128, **names)


def line(text: str, width: int = 70) -> str:
    """The beginning of a text on one line."""
    return shorten(text, width, placeholder=" ...")


def interval(values: Tensor, num_bootstraps: int = 2000) -> tuple[float, float, float]:
    """The mean of some values with its 95% interval by bootstrap."""
    drawn = torch.randint(len(values), (num_bootstraps, len(values)), generator=torch.Generator().manual_seed(0))
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return float(values.mean()), low, high
