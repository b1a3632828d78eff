"""The matrix K of a checkpoint before it is damped, and what a damping makes of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from lightning_trak.scoring.newton.gram import DampedGram
from lightning_trak.scoring.newton.kernel import DampedKernel
from lightning_trak.scoring.newton.lag import alignment

System = DampedGram | DampedKernel
AnySystem = TypeVar("AnySystem", DampedGram, DampedKernel)


@dataclass(frozen=True)
class Undamped(Generic[AnySystem]):
    """K = sum_j R_j phi_j phi_j^T, in the primal or in the dual.

    Attributes:
        trace: sum_j w_j with w_j = R_j |phi_j|^2.
        squared_weights: sum_j w_j^2.
        factor: makes the system of a relative damping.
        residual_step: of such a system: lambda |(K + lambda I)^-1 sum_j Q_j phi_j|^2, and sum_j Q_j^2 |phi_j|^2.
    """

    trace: Tensor
    squared_weights: Tensor
    factor: Callable[[float], AnySystem]
    residual_step: Callable[[AnySystem], tuple[float, float]]
    _kept: dict[float, AnySystem] = field(default_factory=dict)

    def damped(self, damping: float) -> AnySystem:
        """The system of a relative damping. The last one is kept.

        Raises:
            ValueError: if it cannot be factored.
        """
        if damping not in self._kept:
            self._kept.clear()  # the next one takes its memory
            self._kept[damping] = self.factor(damping)
        return self._kept[damping]

    def alignment(self, damping: float, scaled: bool) -> float:
        """See :func:`~lightning_trak.scoring.newton.lag.alignment`, at a relative damping."""
        system = self.damped(damping)
        step, squares = self.residual_step(system)
        return alignment(step, system.effective_dimension(), squares / float(self.trace), scaled)
