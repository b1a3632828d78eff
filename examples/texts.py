"""Functions that the examples on text use."""

import gzip
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

from tokenizers import ByteLevelBPETokenizer, processors
from transformers import PreTrainedTokenizerFast


def read_text(path: Path) -> str:
    """The content of a text file. The file may be compressed with gzip."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        return file.read()


def learn_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-pair encoding from texts. Special tokens surround texts and pairs of texts, as in BERT."""
    special = ["[PAD]", "[CLS]", "[SEP]"]
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts, vocab_size, special_tokens=special, show_progress=False)
    learnt.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    names = dict(zip(("pad_token", "cls_token", "sep_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, model_max_length=128, eos_token="[SEP]", **names)


def line(text: str, width: int = 70) -> str:
    """The beginning of a text on one line."""
    return shorten(text, width, placeholder=" ...")
