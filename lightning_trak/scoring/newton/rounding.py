"""What rounding to integers changes in TRAK's scores."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple


class RoundingEffect(NamedTuple):
    """What rounding changes in the scores of a checkpoint.

    Attributes:
        share: of their size, see :meth:`~lightning_trak.scoring.newton.gram.DampedGram.score_noise`.
        name: of the checkpoint in errors.
        damping: lambda, relative to the mean eigenvalue of K.
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
