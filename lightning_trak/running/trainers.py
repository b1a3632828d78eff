"""Borrowing the user's Trainer."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import PassThroughProfiler

from lightning_trak.compatibility import is_running, parts_that_a_run_changes
from lightning_trak.running.predict import PredictModule
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.stopping import Interruption
from lightning_trak.running.strategies import refuse_spawning


def predict_over(
    trainer: L.Trainer, module: PredictModule, loaders: Sequence[Any], interruption: Interruption | None = None
) -> None:
    """Run a module on the user's Trainer, and leave the Trainer as it was.

    Args:
        trainer: the user's. No logger, profiler, data module and callback but the progress bar takes part.
        module: what runs. It releases its model at the end.
        loaders: its dataloaders.
        interruption: what SIGTERM and Ctrl-C do; default: they end the run at once.

    Raises:
        ValueError: if the Trainer would skip batches, is in the middle of a run, or spawns or forks its processes.
    """
    refuse_spawning(trainer)
    with _borrowed(trainer, module, interruption):
        trainer.predict(module, loaders, return_predictions=False)


@contextmanager
def _borrowed(trainer: L.Trainer, ours: PredictModule, interruption: Interruption | None = None) -> Iterator[None]:
    """Prepare the user's Trainer for :func:`predict_over`, and put it back afterwards."""
    limit = trainer.limit_predict_batches
    if limit != 1.0 or isinstance(limit, int):  # 1 is one batch, 1.0 is all of them
        raise ValueError(
            f"the Trainer has limit_predict_batches={limit} (fast_dev_run sets it too), so some"
            " examples would be missed; use a Trainer without it"
        )
    if is_running(trainer):
        raise ValueError(
            "the Trainer is in the middle of a run, which another one would end: wait until it is over (a callback's"
            " on_fit_end is late enough), or use a Trainer of its own here"
        )
    before = [(part, dict(vars(part))) for part in parts_that_a_run_changes(trainer)]
    module = cast(L.LightningModule, trainer.strategy.lightning_module)
    bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.callbacks = bars  # type: ignore[attr-defined]
    trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]
    trainer.datamodule = None  # type: ignore[attr-defined]  # else it would be prepared and set up again
    trainer.predict_loop = type(trainer.predict_loop)(trainer, trainer.predict_loop.inference_mode)
    try:
        with (interruption or Interruption()).watching(trainer), isolated_random_states(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*RangeLoader.*")  # it may have nothing left to do
            warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's own, in every loop
            yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)
        trainer.strategy.connect(module)
        ours.release()
