"""The learning rate of each checkpoint."""

import math
from collections.abc import Sequence
from typing import Literal

from lightning_trak.checkpoints import Checkpoint

LearningRates = float | Sequence[float] | Literal["snapshots"]


def resolve_learning_rates(learning_rates: LearningRates, checkpoints: Sequence[Checkpoint]) -> list[float]:
    """One learning rate for each checkpoint.

    Args:
        learning_rates: ``"snapshots"``: those of the last steps before the snapshots that ``TRAKCallback`` took; or a
            number for all checkpoints, or one for each.
        checkpoints: the checkpoints.

    Raises:
        ValueError: if the learning rate of a checkpoint is not known or is not one number, or if those given are not as
            many as the checkpoints, negative, all 0 or not finite.
    """
    count = len(checkpoints)
    if isinstance(learning_rates, str):
        if learning_rates != "snapshots":
            raise ValueError(f"learning_rates must be numbers or 'snapshots'; got {learning_rates!r}")
        rates = [_recorded(checkpoint) for checkpoint in checkpoints]
    elif isinstance(learning_rates, (int, float)):
        rates = [float(learning_rates)] * count
    else:
        rates = [float(rate) for rate in learning_rates]
    if len(rates) != count:
        raise ValueError(f"expected one learning rate for each of {count} checkpoints, got {len(rates)}")
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates) or not any(rates):
        raise ValueError(f"learning rates must be finite, at least 0 and not all 0; got {rates}")
    return rates


def _recorded(checkpoint: Checkpoint) -> float:
    advice = "pass learning_rates=, one number for each checkpoint"
    if checkpoint.record is None:
        raise ValueError(
            f"{checkpoint.name} comes without its learning rate: {advice}, or use a directory of TRAKCallback's"
            " snapshots"
        )
    rates = {group.lr for group in checkpoint.record.parameter_groups}
    if None in rates or not rates:
        raise ValueError(f"{checkpoint.name} was taken of an optimizer that has no learning rate: {advice}")
    if len(rates) > 1:
        found = ", ".join(f"{rate:g}" for rate in sorted(rate for rate in rates if rate is not None))
        raise ValueError(
            f"the parameter groups of {checkpoint.name} had learning rates {found}, and it does not say which"
            f" parameters were in which: {advice}, that of the selected parameters (parameters=)"
        )
    return float(rates.pop() or 0.0)
