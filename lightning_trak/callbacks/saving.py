"""What all callbacks that keep snapshots do alike, whichever Trainer calls them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

from lightning.pytorch.utilities import rank_zero_warn

from lightning_trak.checkpoints.weights import is_extra_state, without_extra_state
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
        ValueError: if several triggers are given, a number is not a positive integer, or the time is negative.
    """
    counts = {"every_n_epochs": every_n_epochs, "every_n_train_steps": every_n_train_steps}
    given = [
        name for name, value in {**counts, "train_time_interval": train_time_interval}.items() if value is not None
    ]
    if len(given) > 1:
        raise ValueError(f"expected at most one trigger, got {' and '.join(sorted(given))}; use a {kind} for each")
    epochs, steps = (None if count is None else positive(name, count) for name, count in counts.items())
    if train_time_interval is not None and train_time_interval < timedelta():
        raise ValueError(f"train_time_interval must not be negative, got {train_time_interval}")
    return (epochs if given else 1), steps


def require_storable(state_dict: Mapping[str, Any]) -> None:
    """Check a module's state dict when training starts, so that it does not fail hours later.

    Raises:
        TypeError: if it has entries that are not dense tensors.
    """
    without_extra_state(state_dict, "the module's state dict")
    extra = [name for name in state_dict if is_extra_state(name)]
    if extra:
        rank_zero_warn(
            f"snapshots leave out the extra state of modules: {', '.join(extra)}; the model that is given for"
            " attribution keeps its own"
        )


def on_rank_zero(action: Callable[[], T], is_rank_zero: bool, broadcast: Callable[[Any], Any]) -> T:
    """Run an action on rank zero. All ranks get its result or its error, so no rank waits for one that has failed.

    Args:
        action: what rank zero does. Its result must be picklable.
        is_rank_zero: whether this is rank zero.
        broadcast: gives all ranks what rank zero has. All ranks call it.
    """
    outcome: T | Exception | None = None
    failure: Exception | None = None
    if is_rank_zero:
        try:
            outcome = action()
        except Exception as error:
            failure = error
            outcome = _portable(error)
    outcome = broadcast(outcome)
    if isinstance(outcome, Exception):
        raise failure or outcome
    return cast(T, outcome)


def _portable(error: Exception) -> Exception:
    """An error that other processes can read. Some errors cannot be pickled, others cannot be unpickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
