"""Borrows the user's Trainer for one run."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, TQDMProgressBar
from lightning.pytorch.profilers import PassThroughProfiler

from lightning_trak.compatibility import is_running, parts_that_a_run_changes
from lightning_trak.packages import is_a
from lightning_trak.running.predict import PredictModule
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.ranks import is_one_of_several
from lightning_trak.running.stopping import Interruption
from lightning_trak.running.strategies import refuse_spawning


def trainer_of(trainer: L.Trainer | None, progress_bar: bool = True) -> L.Trainer:
    """The Trainer that a user gives; without one, a new Trainer on one device: a GPU or the like, if there is one.

    The new one has Lightning's default precision, and neither logger nor checkpoints. Its progress bar is that of tqdm,
    which notebooks can show without further packages.

    Args:
        trainer: what the user gives as the Trainer.
        progress_bar: whether a new one shows its progress.

    Raises:
        TypeError: if it is something else, such as data.
        ValueError: if there is none, and this process is one of several that run together.
    """
    if trainer is not None:
        if isinstance(trainer, type) or not hasattr(trainer, "strategy"):
            kind = trainer if isinstance(trainer, type) else type(trainer)
            got = "the class" if isinstance(trainer, type) else "an object of"
            raise TypeError(
                f"expected a Trainer of Lightning first, got {got} {kind.__module__}.{kind.__qualname__}; without a"
                " Trainer, give the data by name, as in featurize(data=...), score(data=...) or attribute(train=...,"
                " targets=...)"
            )
        return trainer
    if is_one_of_several() or os.environ.get("WORLD_SIZE", "") not in ("", "1"):  # torchrun sets it
        raise ValueError(
            "this is one of several processes, and without a Trainer each would do all of the work: give the Trainer"
            " whose processes share it"
        )
    with quiet():
        return L.Trainer(
            accelerator="auto",
            devices=1,
            logger=False,
            callbacks=[TQDMProgressBar()] if progress_bar else None,
            enable_checkpointing=False,
            enable_progress_bar=progress_bar,
            enable_model_summary=False,
        )


def first_batches_alone(trainer: L.Trainer) -> str | None:
    """The setting, if there is one, that lets a Trainer train on the first batches of its data alone."""
    settings = ("fast_dev_run", "overfit_batches")
    return next((name for name in settings if getattr(trainer, name)), None)


# Messages of all of Lightning go through the logger of the package that was imported last.
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off Lightning's info messages, which are the same for every new Trainer."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(max(logger.getEffectiveLevel(), logging.WARNING))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def predict_over(
    trainer: L.Trainer, module: PredictModule, loaders: Sequence[Any], interruption: Interruption | None = None
) -> None:
    """Run ``trainer.predict`` with one of our modules, and leave the Trainer as it was.

    Args:
        trainer: the user's Trainer. Its loggers, profiler, data module and callbacks take no part, except the progress
            bar.
        module: the module to run. It releases its model at the end.
        loaders: its dataloaders.
        interruption: what SIGTERM and Ctrl-C do; default: they end the run at once.

    Raises:
        ValueError: if the Trainer would skip batches, is in the middle of a run, or spawns or forks its processes.
    """
    refuse_spawning(trainer)
    with _borrowed(trainer, module, interruption):
        trainer.predict(module, loaders, return_predictions=False)


@contextmanager
def _borrowed(trainer: L.Trainer, ours: PredictModule, interruption: Interruption | None) -> Iterator[None]:
    """Prepare the user's Trainer for :func:`predict_over`, and restore it afterwards."""
    limit = trainer.limit_predict_batches
    if limit != 1.0 or isinstance(limit, int):  # 1 is one batch, 1.0 is all of them
        raise ValueError(
            f"the Trainer has limit_predict_batches={limit} (fast_dev_run sets it too), so it would skip some"
            " examples; use a Trainer without this limit"
        )
    if is_running(trainer):
        raise ValueError(
            "the Trainer is in the middle of a run, and a second run would end the first: wait until it has ended (a"
            " callback's on_fit_end is late enough), or use another Trainer here"
        )
    before = [(part, dict(vars(part))) for part in parts_that_a_run_changes(trainer)]
    module = cast(L.LightningModule, trainer.strategy.lightning_module)
    bars = [callback for callback in trainer.callbacks if is_a(callback, ProgressBar)]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.callbacks = bars  # type: ignore[attr-defined]
    trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]
    trainer.datamodule = None  # type: ignore[attr-defined]  # otherwise the Trainer would prepare and set it up again
    trainer.predict_loop = type(trainer.predict_loop)(trainer, trainer.predict_loop.inference_mode)
    try:
        with (interruption or Interruption()).watching(trainer), isolated_random_states(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*RangeLoader.*")  # a loader may be empty
            warnings.filterwarnings("ignore", ".*LeafSpec.*")  # caused by Lightning itself
            warnings.filterwarnings("ignore", ".*implemented the batching rule.*")  # vmap's, and no user can change it
            yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)
        trainer.strategy.connect(module)
        ours.release()
