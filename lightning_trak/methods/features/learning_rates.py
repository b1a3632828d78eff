"""The learning rate of each checkpoint."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.texts.messages import listed

LearningRates = float | Sequence[float] | Literal["snapshots"]


def resolve_learning_rates(
    learning_rates: LearningRates, checkpoints: Sequence[Checkpoint], selected: Callable[[], Iterable[str]]
) -> list[float]:
    """One learning rate for each checkpoint.

    Args:
        learning_rates: ``"snapshots"``: the rate of the last step before each snapshot, which ``TRAKCallback``
            recorded; or a number for all checkpoints, or one for each.
        checkpoints: the checkpoints.
        selected: names of the parameters whose gradients are compared; called only if groups had different rates.

    Raises:
        ValueError: if the learning rate of a checkpoint is not known or differs between selected parameters, or if the
            rates given are not one for each checkpoint, or are negative, all 0 or not finite.
    """
    count = len(checkpoints)
    if isinstance(learning_rates, str):
        if learning_rates != "snapshots":
            raise ValueError(f"learning_rates must be numbers or 'snapshots'; got {learning_rates!r}")
        rates = [_recorded(checkpoint, selected) for checkpoint in checkpoints]
    elif isinstance(learning_rates, (int, float)):
        rates = [float(learning_rates)] * count
    else:
        rates = [float(rate) for rate in learning_rates]
    if len(rates) != count:
        raise ValueError(f"expected one learning rate for each of {count} checkpoints, got {len(rates)}")
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not any(rates):
        raise ValueError(f"learning rates must be finite, at least 0 and not all 0; got {rates}")
    return rates


def _recorded(checkpoint: Checkpoint, selected: Callable[[], Iterable[str]]) -> float:
    advice = "pass learning_rates=, one number for each checkpoint"
    if checkpoint.record is None:
        raise ValueError(
            f"no learning rate is known of {checkpoint.name}: {advice}, or use a directory of TRAKCallback's snapshots"
        )
    groups = checkpoint.record.parameter_groups
    if not groups or any(group.lr is None for group in groups):
        raise ValueError(f"{checkpoint.name} was taken of an optimizer that has no learning rate: {advice}")
    if len({group.lr for group in groups}) == 1:
        return float(groups[0].lr or 0.0)
    if not any(group.parameters for group in groups):
        found = ", ".join(f"{rate:g}" for rate in sorted({group.lr or 0.0 for group in groups}))
        raise ValueError(
            f"the parameter groups of {checkpoint.name} had learning rates {found}, and it does not say which"
            f" parameters were in which group: {advice}, that of the selected parameters (parameters=)"
        )
    members: dict[tuple[float, ...], list[str]] = {}  # selected parameters by the rates that they had
    for name in selected():
        rates = {group.lr or 0.0 for group in groups if name in group.parameters}
        members.setdefault(tuple(sorted(rates)), []).append(name)
    distinct = sorted(members)
    if len(distinct) > 1 or len(distinct[0]) != 1:
        found = "; ".join(f"{_and(rates)} ({listed(members[rates])})" for rates in distinct)
        raise ValueError(
            f"the selected parameters had several learning rates at {checkpoint.name}: {found}. Features project all"
            " gradients together and cannot be weighed apart: make one TracIn for the parameters of each rate, by"
            " parameters= and with a store of its own, and add the scores; or pass learning_rates=, one number for each"
            " checkpoint"
        )
    return distinct[0][0]


def _and(rates: tuple[float, ...]) -> str:
    return " and ".join(f"{rate:g}" for rate in rates) or "none"
