"""Refuses the Trainer strategies that a method cannot work with."""

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from lightning_trak.compatibility import start_method, tensor_parallel_size
from lightning_trak.packages import is_a


def require_whole_parameters(trainer: L.Trainer) -> None:
    """Refuse a Trainer whose strategy splits the parameters over ranks.

    Raises:
        ValueError: if the strategy splits the parameters.
    """
    if is_a(trainer.strategy, FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy):
        raise ValueError(
            f"{type(trainer.strategy).__name__} splits the parameters over ranks, but each rank needs whole parameters"
            " here: use a Trainer with strategy='ddp' or a single device (methods over stored features, such as TRAK,"
            " also take ModelParallelStrategy, which is FSDP2)"
        )


def shards_model(trainer: L.Trainer) -> bool:
    """Whether the Trainer's strategy shards the model as FSDP2 does.

    Raises:
        ValueError: if it splits the parameters in another way.
    """
    strategy = trainer.strategy
    if not is_a(strategy, ModelParallelStrategy):
        require_whole_parameters(trainer)
        return False
    size = tensor_parallel_size(strategy)
    if size > 1:
        raise ValueError(
            f"ModelParallelStrategy has tensor_parallel_size={size} ('auto' is the number of devices of a node), but"
            " per-example gradients cannot be computed for layers that tensor parallelism splits: use"
            f" tensor_parallel_size=1 with data_parallel_size={trainer.num_nodes * strategy.num_processes}, which is"
            " FSDP2, or strategy='ddp'"
        )
    return True


def refuse_spawning(trainer: L.Trainer) -> None:
    """Refuse a Trainer that spawns or forks its processes, because their results do not come back.

    Raises:
        ValueError: if the Trainer's strategy spawns or forks its processes.
    """
    method = start_method(trainer)
    if method is not None:
        raise ValueError(
            f"a strategy that spawns or forks processes ({type(trainer.strategy).__name__}, by {method!r}) cannot be"
            " used here, because their results do not come back: use strategy='ddp' in a script, or devices=1 in a"
            " notebook"
        )
