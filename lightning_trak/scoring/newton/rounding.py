"""What rounding to integers changes in TRAK's scores, by what it has changed in each column of the features."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_trak.features.rows import Rounding
from lightning_trak.scoring.newton.gram import PROBES, random_signs
from lightning_trak.scoring.newton.undamped import System


def score_error(
    rounding: Rounding, system: System, damping: float, num_examples: int, prepared: Callable[[Tensor], Tensor]
) -> float:
    """What rounding adds to the scores of the training examples for each other, relative to their root mean square.

    Rounding adds errors e_i: the score phi_i^T A^-1 phi_x, for A = K + lambda I, changes by e_i^T A^-1 phi_x. Summed
    with weights R, the squares of these changes are tr(E A^-1 K A^-1) on average, if errors are independent between
    columns and have variances E. Random targets with these variances estimate it.

    Rounding also removes columns: one of which less is kept than lost has no part in K and in the scores. If it had c
    in K, it had about (c / (c + lambda))^2 in the squares of the scores. If there are more such columns than examples,
    together they had only as many directions as there are examples.

    Args:
        rounding: of the features, in float64.
        system: K + lambda I.
        damping: lambda, relative to the mean eigenvalue of K.
        num_examples: the number of examples in K.
        prepared: from the features of targets, float64, ``(num_targets, k)``, to what the system takes.
    """
    kept, lost = (part / rounding.kept.sum() for part in rounding)
    targets = random_signs(PROBES, len(lost)) * lost.sqrt()
    noise = system.trace * float(system.squared_effects(prepared(targets)).mean())
    gone = lost > kept
    columns = max(1.0, int(gone.sum()) / num_examples)  # for each direction
    shares = lost / (lost + kept + damping / (len(lost) * columns))
    missing = float(shares[gone].square().sum()) / columns
    return float(((max(noise, 0.0) + missing) / (system.squared_scores() + missing)) ** 0.5)


class RoundingEffect(NamedTuple):
    """What rounding changes in the scores of a checkpoint.

    Attributes:
        share: see :func:`score_error`.
        name: of the checkpoint in errors.
        damping: as for :func:`score_error`.
    """

    share: float
    name: str
    damping: float

    def __str__(self) -> str:
        return (
            f"rounding the features to integers changes scores with the Gram matrix of {self.name} by about"
            f" {self.share:.0%} of their size: use a dtype of more bits or a larger damping (now {self.damping:g})"
        )

    def require_small(self) -> None:
        """Refuse scores of which rounding changes more than a half.

        Raises:
            ValueError: if it does.
        """
        if self.share > 0.5:
            raise ValueError(str(self))


def warn_of_rounding(effects: Sequence[RoundingEffect]) -> None:
    """Warn of the largest effect if it is above a fifth."""
    worst = max(effects, default=None)
    if worst is not None and worst.share > 0.2:
        warnings.warn(str(worst), RuntimeWarning, stacklevel=2)
