"""The loaders of a LightningDataModule. A data module that is set up is not set up again.

If ``setup`` splits the data at random, each call gives another split. A second call may turn training examples into
targets.
"""

import random
import warnings
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_trak.compatibility import InfiniteBarrier, starts_script_again
from lightning_trak.packages import overrides
from lightning_trak.running.data.content import sample_digest
from lightning_trak.running.data.loaders import plain_loaders
from lightning_trak.running.random_states import RandomWatch, isolated_random_states

_HOOKS = {"fit": "train_dataloader", "predict": "predict_dataloader"}


def loaders_of(datamodule: L.LightningDataModule, stage: str, trainer: L.Trainer) -> list[DataLoader[Any]]:
    """The data module's loaders of a stage.

    If a Trainer has used the data module before and it can give the loaders, they are taken as they are. Otherwise
    ``setup(stage)`` is called. If no Trainer has used the data module, ``prepare_data()`` is called before that. The
    result is refused if ``setup`` has changed the training data that the data module had.

    Args:
        datamodule: the data module. It is attached to the Trainer, as by the Trainer's own methods.
        stage: ``"fit"`` for ``train_dataloader()``, ``"predict"`` for ``predict_dataloader()``.
        trainer: the Trainer. Its processes wait for the process that prepares the data.

    Raises:
        TypeError: if the data module lacks the method, or its datasets have no positions.
        ValueError: if ``setup`` draws other data each time that it is called, or changes the training data. The data
            module is then restored.
    """
    hook, name = _HOOKS[stage], type(datamodule).__name__
    if not overrides(datamodule, hook, L.LightningDataModule):
        whose = "the training data" if stage == "fit" else "the targets"
        raise TypeError(f"{name} has no {hook}(), which must give {whose}; define it, or in Python pass a DataLoader")
    met, before = getattr(datamodule, "trainer", None) is not None, dict(vars(datamodule))
    datamodule.trainer = trainer
    found = _ask(datamodule, hook) if met else None
    if found is not None:
        return found
    trained = _ask(datamodule, _HOOKS["fit"])
    try:
        with isolated_random_states():
            if not met:
                _prepare(datamodule, trainer)
            watch = RandomWatch(torch.device("cpu"))
            datamodule.setup(TrainerFn(stage))
            drawn = watch.drawn()
        found = _require(datamodule, hook)
        now = _ask(datamodule, _HOOKS["fit"])
        if trained is not None and now is not None and not _same(trained, now):
            raise ValueError(
                f"setup({stage!r}) of {name} changes the training data that it had before: split the data with a"
                " generator that has a fixed seed, such as random_split(data, lengths,"
                " torch.Generator().manual_seed(0)), or in Python pass the loaders instead of the data module"
            )
        if drawn and not _is_repeatable(datamodule, before, stage, found):
            message = (
                f"setup({stage!r}) of {name} draws the data at random, so they may differ from the training data: use"
                " a generator that has a fixed seed, or in Python pass the loaders that were used in training"
            )
            if met:
                raise ValueError(message)
            warnings.warn(message, stacklevel=5)
    except BaseException:
        vars(datamodule).clear()
        vars(datamodule).update(before)
        raise
    return found


def _require(datamodule: L.LightningDataModule, hook: str) -> list[DataLoader[Any]]:
    given = getattr(datamodule, hook)()
    try:
        return plain_loaders(given)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{hook}() of {type(datamodule).__name__}: {error}") from error


def _ask(datamodule: L.LightningDataModule, hook: str) -> list[DataLoader[Any]] | None:
    """The loaders that the data module gives without another setup; None if it gives none, for whatever reason."""
    try:
        return _require(datamodule, hook)
    except Exception:  # the call after setup raises the reason
        return None


def _same(some: list[DataLoader[Any]], others: list[DataLoader[Any]]) -> bool:
    """Whether the loaders' datasets have the same sizes and the same content, judged by eight items."""

    def describe(loaders: list[DataLoader[Any]]) -> list[tuple[int, str | None]]:
        return [(len(loader.dataset), sample_digest(loader)) for loader in loaders]  # type: ignore[arg-type]

    return describe(some) == describe(others)


def _is_repeatable(
    datamodule: L.LightningDataModule, before: dict[str, Any], stage: str, found: list[DataLoader[Any]]
) -> bool:
    """Whether setup gives the same data with other random numbers. It is tried on a copy in the state before setup."""
    twin = object.__new__(type(datamodule))
    vars(twin).update(before, trainer=datamodule.trainer)
    with isolated_random_states():
        seed = (torch.initial_seed() + 1) % 2**32
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        twin.setup(TrainerFn(stage))
        other = _ask(twin, _HOOKS[stage])
    return other is not None and _same(found, other)


def _prepare(datamodule: L.LightningDataModule, trainer: L.Trainer) -> None:
    """Call ``prepare_data`` in one process, or in one process per machine. The other processes wait."""
    if not overrides(datamodule, "prepare_data", L.LightningDataModule):
        return
    launcher = trainer.strategy.launcher
    if launcher is not None and starts_script_again(trainer) and trainer.world_size > 1 and not dist.is_initialized():
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)  # start the processes that wait
    with InfiniteBarrier():
        per_node = getattr(datamodule, "prepare_data_per_node", True)
        if trainer.local_rank == 0 and (per_node or trainer.global_rank == 0):
            datamodule.prepare_data()
