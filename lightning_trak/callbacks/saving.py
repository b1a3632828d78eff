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


def single_trigger(kind: str, counts: Mapping[str, int | None], interval: timedelta | None = None) -> str | None:
    """The name of the only trigger that the user gave; None if there is none.

    Args:
        kind: the class of the callback, for errors.
        counts: numbers of epochs or steps by the name of the trigger.
        interval: the trigger ``train_time_interval``.

    Raises:
        ValueError: if several triggers are given, a number is not a positive integer, or the time is negative.
    """
    given = [name for name, value in {**counts, "train_time_interval": interval}.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"expected at most one trigger, got {' and '.join(sorted(given))}; use a {kind} for each")
    for name, count in counts.items():
        if count is not None:
            positive(name, count)
    if interval is not None and interval < timedelta():
        raise ValueError(f"train_time_interval must not be negative, got {interval}")
    return next(iter(given), None)


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
