"""What this package does with the user's Trainer, apart from running it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_trak.running.predict import PredictModule
from lightning_trak.running.stopping import Interruption


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


def predict_over(
    trainer: L.Trainer, module: PredictModule, loaders: Sequence[Any], interruption: Interruption | None = None
) -> None:
    """Run a predict loop of ours on the user's Trainer, which is as it was afterwards.

    Args:
        trainer: the user's. No logger, profiler, data module and callback but the progress bar takes part.
        module: what runs; it lets go of its model in the end.
        loaders: its dataloaders.
        interruption: what SIGTERM and Ctrl-C do; default: they end the run at once.

    Raises:
        ValueError: if the Trainer would skip batches, or is in the middle of a run.
    """
    with _borrowed(trainer, module, interruption):
        trainer.predict(module, loaders, return_predictions=False)


@contextmanager
def _borrowed(trainer: L.Trainer, ours: PredictModule, interruption: Interruption | None = None) -> Iterator[None]:
    """The user's Trainer, ready for :func:`predict_over`, and as it was afterwards."""
    limit = trainer.limit_predict_batches
    if limit != 1.0 or isinstance(limit, int):  # 1 is one batch, 1.0 is all of them
        raise ValueError(
            f"the Trainer has limit_predict_batches={limit} (fast_dev_run sets it too), so some"
            " examples would be missed; use a Trainer without it"
        )
    loops = _loops(trainer)
    if any(loop._data_fetcher is not None for loop in loops):
        raise ValueError(
            "the Trainer is in the middle of a run, which another one would end: wait until it is over (a callback's"
            " on_fit_end is late enough), or use a Trainer of its own here"
        )
    changed = [trainer, trainer.state, trainer._data_connector, trainer._logger_connector]
    changed += [*loops, *(loop._data_source for loop in loops)]
    before = [(part, dict(vars(part))) for part in changed]
    module = cast(L.LightningModule, trainer.strategy.lightning_module)
    bars = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.callbacks = bars  # type: ignore[attr-defined]
    trainer.profiler = PassThroughProfiler()  # type: ignore[attr-defined]
    trainer.datamodule = None  # type: ignore[attr-defined]  # else it would be prepared and set up again
    trainer.predict_loop = type(trainer.predict_loop)(trainer, trainer.predict_loop.inference_mode)
    try:
        with (interruption or Interruption()).watching(trainer), isolate_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*RangeLoader.*")  # it may have nothing left to do
            warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's own, in every loop
            yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)
        trainer.strategy.connect(module)
        ours.release()


def _loops(trainer: L.Trainer) -> list[Any]:
    validation = trainer.fit_loop.epoch_loop.val_loop
    return [trainer.fit_loop, validation, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]


def refuse_spawning(trainer: L.Trainer) -> None:
    """Results come back from processes that run the user's script, not from spawned or forked ones.

    Raises:
        ValueError: if the Trainer's strategy spawns or forks its processes.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise ValueError(
            f"a strategy that spawns or forks processes ({type(trainer.strategy).__name__}, by"
            f" {launcher._start_method!r}) cannot be used here, since what they compute does not come back: use"
            " strategy='ddp' in a script, or devices=1 in a notebook"
        )
