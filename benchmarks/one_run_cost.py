"""What a recorded run costs: to record it, and to differentiate it. Times in trainings; memory against its length."""

import itertools
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from benchmarks.memory import MIB, in_new_process, peak_of
from benchmarks.tasks import DigitsMLP, Task, make_tasks
from benchmarks.timing import Action, Row, Run, on_threads, ratios, rows
from benchmarks.truth import quiet
from lightning_trak import Metagradient, TrainingRecorder
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.replay import Recording

TASK, TARGETS, QUICK_TARGETS = "written digits", 100, 5
# Steps of two lengths; and a run ten times as long, since a run of T steps has sqrt(T) full states.
RECORDED = (TASK, 1), (TASK, 10), ("photographs conv", 1)
STEPS, QUICK_STEPS = (100, 1_000, 10_000), (20, 80)
BATCH = 10


class GentleMLP(DigitsMLP):
    """It is trained for many epochs on random labels, and a larger learning rate would amplify each change too much."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def one_run(run: Run) -> list[Row]:
    """Times on one thread and on all, or on a GPU; on a CPU, memory and disk for runs of several lengths."""
    quiet()
    if run.device.type == "cuda":
        return _times(run, "GPU")
    found = []
    for threads in [1] if run.quick else sorted({1, os.cpu_count() or 1}):
        with on_threads(threads):
            found += _times(run, f"{threads} thread{'s' * (threads > 1)}")
    for steps in QUICK_STEPS if run.quick else STEPS:
        found += _sizes(run, steps)
    return found


def _fit(
    model: L.LightningModule,
    loader: DataLoader[tuple[Tensor, ...]],
    epochs: int,
    *callbacks: L.Callback,
    accelerator: str = "cpu",
) -> L.Trainer:
    torch.manual_seed(0)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(model, loader)
    return trainer


def _times(run: Run, name: str) -> list[Row]:
    tasks = make_tasks()
    recorded = [row for task, times in RECORDED for row in _recording(run, tasks[task], times, name)]
    return recorded + _scores(run, tasks[TASK], name)


def _recording(run: Run, task: Task, times: int, name: str) -> list[Row]:
    """Times with a recorder as multiples of those without, for so many times the task's epochs."""
    epochs = min(times, 2) if run.quick else times * task.max_epochs
    loader = DataLoader(task.train, batch_size=task.batch_size, shuffle=True)
    fit = partial(_fit, accelerator=run.device.type)
    with tempfile.TemporaryDirectory(dir=run.out) as folder:
        directories = map(Path(folder).joinpath, map(str, itertools.count()))

        def record() -> None:
            fit(task.make_module(), loader, epochs, TrainingRecorder(next(directories)))

        measured = ratios(lambda: fit(task.make_module(), loader, epochs), {"record": record}, run.repetitions)
        started = time.perf_counter()
        fit(task.make_module(), loader, epochs)
        steps = epochs * len(loader)
        step = (time.perf_counter() - started) / steps
    named = {f"{name}: TrainingRecorder, {task.name}, {steps} steps": measured["record"]}
    return rows("one_run", named, f"of a training with steps of about {1e3 * step:.1f} ms")


def _scores(run: Run, task: Task, name: str) -> list[Row]:
    """Times of scores as multiples of one training without a recorder."""
    epochs, many = (1, QUICK_TARGETS) if run.quick else (task.max_epochs, TARGETS)
    loader = DataLoader(task.train, batch_size=task.batch_size, shuffle=True)
    fit = partial(_fit, accelerator=run.device.type)
    with tempfile.TemporaryDirectory(dir=run.out) as folder:
        model = task.make_module()
        trainer = fit(model, loader, epochs, TrainingRecorder(folder))

        def attribute(count: int, check_smooth: bool = False) -> None:
            method = Metagradient(model, folder, output=task.output, check_smooth=check_smooth, progress_bar=False)
            method.attribute(trainer, loader, Subset(task.targets, range(count)))

        actions: dict[str, Action] = {
            "1 target": lambda: attribute(1),
            "1 target, with the check": lambda: attribute(1, check_smooth=True),
            f"{many} targets": lambda: attribute(many),
        }
        measured = ratios(lambda: fit(task.make_module(), loader, epochs), actions, run.repetitions)
    named = {f"{name}: {key}": values for key, values in measured.items()}
    return rows("one_run", named, f"of a training of {epochs * len(loader)} steps")


def _sizes(run: Run, steps: int) -> list[Row]:
    """Disk, and peak memory in a new process, for a run of a small model."""
    with tempfile.TemporaryDirectory(dir=run.out) as folder:
        fit, scores, disk, states = in_new_process(_measure, steps, Path(folder))
    sizes = {"memory of fit": fit, "memory of scores": scores, "disk": disk}
    return [
        Row("one_run", f"{steps} steps: {name}", size / MIB, "MiB", note=f"{states} full states")
        for name, size in sizes.items()
    ]


def _measure(steps: int, folder: Path) -> tuple[int, int, int, int]:
    """Record and differentiate a run of so many steps. A short run goes before, to load code."""
    quiet()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(100, 1, 8, 8, generator=generator), torch.arange(100) % 10)
    loader, model = DataLoader(data, BATCH, shuffle=True), GentleMLP()
    epochs = -(-steps // len(loader))

    def fit(epochs: int, directory: Path) -> None:
        _fit(model, loader, epochs, TrainingRecorder(directory))

    def attribute(directory: Path) -> None:
        method = Metagradient(model, directory, output=ClassificationMargin(), check_smooth=False, progress_bar=False)
        method.attribute(L.Trainer(accelerator="cpu", logger=False), loader, Subset(data, [0]))

    fit(1, folder / "short")
    attribute(folder / "short")
    directory = folder / "run"
    memory = peak_of(lambda: fit(epochs, directory)), peak_of(lambda: attribute(directory))
    disk = sum(path.stat().st_size for path in directory.iterdir())
    return *memory, disk, len(Recording(directory).state_steps)
