"""What all callbacks that keep snapshots do alike, whichever Trainer calls them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import NoneType
from typing import Any, TypeVar, cast

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim import Optimizer

from lightning_trak.callbacks.runs import run_from
from lightning_trak.checkpoints.digests import frozen_digest
from lightning_trak.checkpoints.optimizers import parameter_groups, preconditioner_of, require_adam
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.checkpoints.weights import without_extra_state
from lightning_trak.checks import positive

T = TypeVar("T")


def intervals(
    kind: str, every_n_epochs: int | None, every_n_train_steps: int | None, train_time_interval: timedelta | None = None
) -> tuple[int | None, int | None]:
    """The numbers of epochs and of steps between snapshots as ``int``; without any trigger, each epoch.

    Args:
        kind: the class of the callback, for errors.
        every_n_epochs: as the user gave it.
        every_n_train_steps: as the user gave it.
        train_time_interval: as the user gave it.

    Raises:
        TypeError: if the time is no timedelta.
        ValueError: if several triggers are given, a number is not a positive integer, or the time is negative.
    """
    counts = {"every_n_epochs": every_n_epochs, "every_n_train_steps": every_n_train_steps}
    triggers = {**counts, "train_time_interval": train_time_interval}
    given = [name for name, value in triggers.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"expected at most one trigger, got {' and '.join(sorted(given))}; use a {kind} for each")
    epochs, steps = (None if count is None else positive(name, count) for name, count in counts.items())
    if not isinstance(train_time_interval, (timedelta, NoneType)):
        raise TypeError(
            "train_time_interval must be a datetime.timedelta, such as timedelta(minutes=30), got"
            f" {train_time_interval!r}"
        )
    if train_time_interval is not None and train_time_interval < timedelta():
        raise ValueError(f"train_time_interval must not be negative, got {train_time_interval}")
    return (epochs if given else 1), steps


@dataclass(frozen=True)
class Training:
    """What is trained and on which rank, whichever Trainer trains it.

    Attributes:
        module: the module, which gives parameters their names.
        optimizers: its optimizers.
        weights: gives the state dict to save, at least on rank zero. All ranks call it.
        is_rank_zero: whether this is rank zero.
        broadcast: gives all ranks what rank zero has. All ranks call it.
    """

    module: nn.Module
    optimizers: Sequence[Optimizer]
    weights: Callable[[], Mapping[str, Any]]
    is_rank_zero: bool
    broadcast: Callable[[Any], Any]

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run an action on rank zero. All ranks get its picklable result or its error, so that none waits in vain."""
        outcome: T | Exception | None = None
        failure: Exception | None = None
        if self.is_rank_zero:
            try:
                outcome = action()
            except Exception as error:
                failure = error
                outcome = _portable(error)
        outcome = self.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise failure or outcome
        return cast(T, outcome)


def gather_state_dict(sharded: nn.Module) -> dict[str, Any]:
    """The whole state dict of a module that FSDP shards, on the CPU of rank zero. All ranks must call this."""
    return get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


class SnapshotWriter:
    """Writes the snapshots of a training from its start until :meth:`close`. All ranks make one and call its methods.

    Args:
        training: what is trained.
        directory: directory of the snapshots. That of rank zero counts.
        step: optimizer steps taken.
        runs: the runs that this one may continue; empty: it is a new one.
        preconditioner: whether to keep what the optimizers multiply gradients by.
        trainable_only: whether the state dict leaves out the parameters that are not trained.
        overwrite: whether to delete the snapshots of another run.
        exist_ok: whether a new run takes the directory of one that started from the same weights.

    Attributes:
        run: identifier of the run.
        saved_step: the step of the last snapshot; -1 if there is none.

    Raises:
        TypeError: if the state dict has entries that are not dense tensors, or an optimizer has no preconditioner.
        ValueError: if the directory belongs to another run, or a learning rate is not finite.
    """

    def __init__(
        self,
        training: Training,
        directory: str,
        step: int,
        runs: Sequence[str],
        *,
        preconditioner: bool,
        trainable_only: bool = False,
        overwrite: bool = False,
        exist_ok: bool = False,
    ) -> None:
        if preconditioner:
            require_adam(training.optimizers)
        self._preconditioner = preconditioner
        self._series: SnapshotSeries | None = SnapshotSeries(training.broadcast(directory))
        self._frozen: str | None = None
        self._groups = {  # of each optimizer, at its last step
            position: parameter_groups(position, optimizer, training.module)
            for position, optimizer in enumerate(training.optimizers)
        }
        series, weights = self._series, training.weights()

        def start() -> tuple[str, int]:
            tensors = without_extra_state(weights, "the module's state dict")  # fails now, not hours later
            extra = [name for name in weights if name not in tensors]
            if extra:
                rank_zero_warn(
                    f"snapshots leave out the extra state of modules: {', '.join(extra)}; the model that is given for"
                    " attribution keeps its own"
                )
            if trainable_only:
                self._frozen = frozen_digest(training.module, weights)
            known = [run_from(step, tensors)] if exist_ok and not runs else runs
            manifest = series.open(known, step, overwrite)
            return manifest.run, max((snapshot.step for snapshot in manifest.snapshots), default=-1)

        try:
            self.run, self.saved_step = training.on_rank_zero(start)
        except BaseException:
            self.close()
            raise

    def note(self, training: Training, optimizer: Optimizer) -> None:
        """Note the learning rates of an optimizer's step. A scheduler may change them before the snapshot is taken."""
        for position, candidate in enumerate(training.optimizers):
            if candidate is optimizer:
                self._groups[position] = parameter_groups(position, optimizer, training.module)

    def save(self, training: Training, step: int, epoch: int) -> None:
        """Save a snapshot, unless its step has one or the writer is closed.

        Raises:
            ValueError: if another run has taken the directory.
            OSError: on all ranks, if the snapshot cannot be written.
        """
        if self._series is None or step <= self.saved_step:
            return
        series, weights = self._series, training.weights()
        groups = [group for groups in self._groups.values() for group in groups]

        def write() -> str:
            also = preconditioner_of(training.optimizers, training.module) if self._preconditioner else None
            return series.save(weights, step, epoch, groups, also, self._frozen).file

        training.on_rank_zero(write)
        self.saved_step = step

    def close(self) -> None:
        """Release the directory, so that another run may write to it."""
        if self._series is not None:
            self._series.close()
            self._series = None


def _portable(error: Exception) -> Exception:
    """An error that other processes can read. Some errors cannot be pickled, others cannot be unpickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
