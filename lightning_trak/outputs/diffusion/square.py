"""The output of D-TRAK: the mean square of a diffusion model's prediction."""

from __future__ import annotations

from torch import Tensor

from lightning_trak.outputs.diffusion.base import DiffusionOutput
from lightning_trak.outputs.surrogate import SurrogateOutput


class DiffusionSquare(DiffusionOutput, SurrogateOutput):
    r"""The output of D-TRAK, :math:`f = \mathrm{mean}_{t, \epsilon} |\epsilon_\theta(x_t, t)|^2 / d`.

    D-TRAK puts the square of the prediction in the place of the loss, in the gradients of training examples and of
    targets, and leaves out the loss gradients Q (Zheng et al. 2024, arXiv 2311.00500, section 3; there
    ``L_Square``, in the code ``mean-squared-l2-norm``). No theory says why its scores agree better with the effects of
    training examples on the loss, but they do. The mean is over the d elements of an example.

    Q = 1 and R = 1: see :class:`~lightning_trak.outputs.surrogate.SurrogateOutput`. So :class:`~lightning_trak.TRAK`
    scores :math:`\phi(x)^T (\Phi^T \Phi + \lambda I)^{-1} \phi_i`. The paper reads a positive score as: training on i
    lowers the loss at x.

    The arguments are those of :class:`~lightning_trak.outputs.diffusion.base.DiffusionOutput`.
    """

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean square of each prediction, shape ``(batch,)``."""
        del target
        return prediction.square().mean(1)
