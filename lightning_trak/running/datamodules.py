"""The loaders of a LightningDataModule. One that has been set up is not set up again.

A split that ``setup`` draws differs each time. A second ``setup`` may turn training examples into targets.
"""

import random
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader

from lightning_trak.compatibility import InfiniteBarrier, starts_script_again
from lightning_trak.running.content import sample_digest
from lightning_trak.running.loaders import plain_loaders
from lightning_trak.running.random_states import isolated_random_states

_HOOKS = {"fit": "train_dataloader", "predict": "predict_dataloader"}


def loaders_of(datamodule: L.LightningDataModule, stage: str, trainer: L.Trainer) -> list[DataLoader[Any]]:
    """The data module's loaders of a stage.

    One that a Trainer has met is taken as it is if it can give them. Otherwise ``setup(stage)`` is called, after
    ``prepare_data()`` if no Trainer has met it; and what comes of it is refused if the training data are others than
    those that the data module had.

    Args:
        datamodule: is attached to the Trainer, as the Trainer's own methods do.
        stage: ``"fit"`` for ``train_dataloader()``, ``"predict"`` for ``predict_dataloader()``.
        trainer: whose processes wait for the one that prepares the data.

    Raises:
        TypeError: if the data module lacks the method, or what it gives has no positions.
        ValueError: if ``setup`` draws other data whenever it is called; the data module is then as it was.
    """
    hook, name = _HOOKS[stage], type(datamodule).__name__
    if not is_overridden(hook, datamodule, L.LightningDataModule):
        whose = "the training data" if stage == "fit" else "the targets"
        raise TypeError(
            f"{name} has no {hook}(), which is asked for {whose}; define it, or pass a DataLoader or Dataset"
        )
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
            drawn = _draws_numbers(lambda: datamodule.setup(TrainerFn(stage)))
        found = _require(datamodule, hook)
        now = _ask(datamodule, _HOOKS["fit"])
        if trained is not None and now is not None and not _same(trained, now):
            raise ValueError(
                f"setup({stage!r}) of {name} changes the training data that it had before: split them with a generator"
                " of a fixed seed, such as random_split(data, lengths, torch.Generator().manual_seed(0)), or pass the"
                " loaders instead of the data module"
            )
        if drawn and not _is_repeatable(datamodule, before, stage, found):
            message = (
                f"setup({stage!r}) of {name} draws the data at random, so that they may not be those of training: use a"
                " generator of a fixed seed, or pass the loaders that training had"
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
    """What the data module gives as it is; None if it gives nothing of use, whatever the reason."""
    try:
        return _require(datamodule, hook)
    except Exception:  # asked again after setup, it says the reason itself
        return None


def _same(some: list[DataLoader[Any]], others: list[DataLoader[Any]]) -> bool:
    """Whether loaders have datasets of the same sizes and, as far as eight items show, content."""

    def describe(loaders: list[DataLoader[Any]]) -> list[tuple[int, str | None]]:
        return [(len(loader.dataset), sample_digest(loader)) for loader in loaders]  # type: ignore[arg-type]

    return describe(some) == describe(others)


def _is_repeatable(
    datamodule: L.LightningDataModule, before: dict[str, Any], stage: str, found: list[DataLoader[Any]]
) -> bool:
    """Whether setup gives the same with other random numbers; tried on a copy that has what was there before."""
    twin = object.__new__(type(datamodule))
    vars(twin).update(before, trainer=datamodule.trainer)
    with isolated_random_states():
        seed = (torch.initial_seed() + 1) % 2**32
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        twin.setup(TrainerFn(stage))
        other = _ask(twin, _HOOKS[stage])
    return other is not None and _same(found, other)


def _draws_numbers(call: Callable[[], None]) -> bool:
    """Whether a call draws random numbers."""

    def states() -> tuple[Any, ...]:
        numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
        return torch.get_rng_state().tolist(), random.getstate(), numpy["pos"], numpy["key"].tolist()

    before = states()
    call()
    return states() != before


def _prepare(datamodule: L.LightningDataModule, trainer: L.Trainer) -> None:
    """Call ``prepare_data`` in one process, or in one on each machine, while the others wait."""
    if not is_overridden("prepare_data", datamodule, L.LightningDataModule):
        return
    launcher = trainer.strategy.launcher
    if launcher is not None and starts_script_again(trainer) and trainer.world_size > 1 and not dist.is_initialized():
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)  # the others must be there to wait
    with InfiniteBarrier():
        per_node = getattr(datamodule, "prepare_data_per_node", True)
        if trainer.local_rank == 0 and (per_node or trainer.global_rank == 0):
            datamodule.prepare_data()
