"""What this package does with the user's Trainer, apart from running it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_trak.outputs import ModelOutput

if TYPE_CHECKING:
    from lightning_trak.predict import PredictModule


def precision_of(trainer: L.Trainer, output: ModelOutput) -> str:
    """The precision that features are made in: the Trainer's, but for two kinds of mixed precision without effect.

    The gradients of float16 need their loss scaled to be in range, and an output is not a loss whose scale training has
    found. An output with a context compares it with what the model gives, and rounding would tell equals apart.
    """
    precision = str(trainer.precision)
    unmixed = precision == "16-mixed" or (precision == "bf16-mixed" and output.context_size)
    return "32-true" if unmixed else precision


def autocast_of(trainer: L.Trainer, output: ModelOutput) -> torch.dtype | None:
    """What the forward pass is autocast to for :func:`precision_of`, if anything."""
    return torch.bfloat16 if precision_of(trainer, output) == "bf16-mixed" else None


def require_whole_parameters(trainer: L.Trainer) -> None:
    """Refuse a Trainer whose strategy splits the parameters.

    Raises:
        ValueError: if it does.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"{type(trainer.strategy).__name__} splits the parameters over ranks, and they are needed whole here: use a"
            " Trainer with strategy='ddp' or a single device (methods over stored features, such as TRAK, also take"
            " ModelParallelStrategy, which is FSDP2)"
        )


def shards_model(trainer: L.Trainer) -> bool:
    """Whether the Trainer's strategy shards the model as FSDP2 does.

    Raises:
        ValueError: if it splits the parameters in another way.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        require_whole_parameters(trainer)
        return False
    size = strategy._tensor_parallel_size
    size = strategy.num_processes if size == "auto" else size
    if size > 1:
        raise ValueError(
            f"ModelParallelStrategy has tensor_parallel_size={size} ('auto' is the number of devices of a node), and"
            " layers split in that way have no per-example gradients of their own: use tensor_parallel_size=1 with"
            f" data_parallel_size={trainer.num_nodes * strategy.num_processes}, which is FSDP2, or strategy='ddp'"
        )
    return True


@contextmanager
def borrowed(trainer: L.Trainer, ours: "PredictModule") -> Iterator[None]:
    """The user's Trainer for a predict loop of ours: no logger and no callback but the progress bar takes part."""
    limit = trainer.limit_predict_batches
    if limit != 1.0 or isinstance(limit, int):  # 1 is one batch, 1.0 is all of them
        raise ValueError(
            f"the Trainer has limit_predict_batches={limit} (fast_dev_run sets it too), so some"
            " examples would be missed; use a Trainer without it"
        )
    loggers, callbacks = trainer.loggers, trainer.callbacks  # type: ignore[attr-defined]
    module = cast(L.LightningModule, trainer.strategy.lightning_module)
    trainer.loggers = []
    bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
    trainer.callbacks = bars  # type: ignore[attr-defined]
    try:
        with isolate_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*RangeLoader.*")  # it may have nothing left to do
            warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's own, in every loop
            yield
    finally:
        trainer.loggers, trainer.callbacks = loggers, callbacks  # type: ignore[attr-defined]
        trainer.strategy.connect(module)
        ours.release()


def refuse_spawning(trainer: L.Trainer) -> None:
    """Results come back from processes that run the user's script, not from spawned or forked ones."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError("a strategy that spawns or forks processes cannot return scores; use strategy='ddp'")
