"""Functions that several examples use."""

import gzip
import json
import logging
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch


def begin(out: Path, quiet: bool = True) -> Path:
    """Make a new directory for this run, let torch use one thread, and if ``quiet`` let Lightning log warnings only."""
    torch.set_num_threads(1)  # the models are too small for more threads
    if quiet:
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it logs the same lines for every Trainer
    warnings.filterwarnings("ignore", ".*LeafSpec.*|.*does not have many workers.*")  # from Lightning itself
    run = out / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    run.mkdir(parents=True)
    return run


def make_trainer(max_epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """A quiet Trainer on the CPU, for one of many models."""
    return L.Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def read_rows(directory: Path, name: str) -> list[dict[str, Any]]:
    """The rows of ``name.jsonl``, or of ``name.jsonl.gz``."""
    plain, packed = directory / f"{name}.jsonl", directory / f"{name}.jsonl.gz"
    if not plain.exists() and not packed.exists():
        raise SystemExit(f'"{directory}" has neither {plain.name} nor {packed.name}')
    text = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    return [json.loads(line) for line in text.splitlines()]
