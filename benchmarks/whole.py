"""The whole call of ``featurize``, from a DataLoader to a store on disk, beside plain passes over the same loader."""

import importlib.util
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.models import WORKLOADS, Workload
from benchmarks.timing import Action, Row, Run, on_threads, ratios, rows
from lightning_trak import TRAK
from lightning_trak.projections import KroneckerProjection, SparseProjection

# Examples and batch size; fewer examples in the short mode, and more on a GPU.
SIZES = {"resnet9": (1000, 32), "perceptron": (4096, 64), "gpt2, 6 layers": (32, 8)}
GPU_SIZES = {"resnet9": (10_240, 512), "gpt2, 6 layers": (256, 32)}
GPU_WORKERS = 8
QUICK_SIZES = {"resnet9": (64, 32), "perceptron": (128, 64), "gpt2, 6 layers": (4, 2)}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "SparseProjection(8192)": {"projection": SparseProjection(8192)},
    "SparseProjection(2048)": {"projection": SparseProjection(2048)},
    "KroneckerProjection(dim=2048)": {"projection": KroneckerProjection(dim=2048)},
}


def whole(run: Run) -> list[Row]:
    """Time ``TRAK.featurize``, as multiples of the plain passes' time, with one thread and with all, or on a GPU."""
    found = []
    on_gpu = run.device.type == "cuda"
    sizes = QUICK_SIZES if run.quick else GPU_SIZES if on_gpu else SIZES
    for threads in [1] if on_gpu else sorted({1, os.cpu_count() or 1}):
        for name, (examples, size) in sizes.items():
            if not name.startswith("gpt2") or importlib.util.find_spec("transformers"):
                with on_threads(threads):
                    measured = _measure(run, WORKLOADS[name](size), examples)
                prefix = f"{name}, GPU" if on_gpu else f"{name}, {threads} thread{'s' * (threads > 1)}"
                named = {f"{prefix}: {setting}": values for setting, values in measured.items()}
                found += rows("featurize", named, f"of forward + backward of {examples} examples")
    return found


def _measure(run: Run, work: Workload, examples: int) -> dict[str, list[float]]:
    work, on_gpu = work.to(torch.device("cpu")), run.device.type == "cuda"
    plain = work.to(run.device)
    loader = DataLoader(
        _Copies(work, examples),
        batch_size=work.size,
        num_workers=GPU_WORKERS if on_gpu else 0,
        pin_memory=on_gpu,
        persistent_workers=on_gpu,
    )
    with tempfile.TemporaryDirectory(dir=run.out) as folder:
        stores = map(Path(folder).joinpath, map(str, itertools.count()))
        actions: dict[str, Action] = {
            setting: lambda options=options: _featurize(run, work, loader, next(stores), options)  # type: ignore[misc]
            for setting, options in SETTINGS.items()
        }
        return ratios(lambda: _plain(plain, loader), actions, run.repetitions)


class _Copies(torch.utils.data.Dataset[Any]):
    """The examples of a workload's batch, again and again."""

    def __init__(self, work: Workload, count: int) -> None:
        self._work = work
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self._count:
            raise IndexError(index)
        return apply_to_collection(self._work.batch, Tensor, lambda part: part[index % self._work.size])


def _plain(work: Workload, loader: DataLoader[Any]) -> None:
    """Forward and backward passes over the loader, with gradients of all parameters."""
    device = next(work.model.parameters()).device
    for batch in loader:
        batch = move_data_to_device(batch, device)
        work.model.zero_grad()
        work.output.output(work.model, batch).sum().backward()


def _featurize(run: Run, work: Workload, loader: DataLoader[Any], store: Path, options: dict[str, Any]) -> None:
    trainer = L.Trainer(
        accelerator=run.device.type,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=store.parent,
    )
    TRAK(work.model, [work.model.state_dict()], store, output=work.output, **options).featurize(trainer, loader)
