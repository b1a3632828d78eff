"""The output of DAS: the mean of a diffusion model's prediction."""

from __future__ import annotations

from torch import Tensor

from lightning_trak.outputs.diffusion.base import DiffusionOutput
from lightning_trak.outputs.surrogate import SurrogateOutput


class DiffusionMean(DiffusionOutput, SurrogateOutput):
    r"""The output of the diffusion attribution score: the mean of the prediction's d elements.

    .. math:: f = \mathrm{mean}_{t, \epsilon} 1^T \epsilon_\theta(x_t, t) / d

    DAS (Lin et al. 2025, ICLR, arXiv 2410.18639) asks how far the prediction itself moves at a target when an example
    is left out. Its gradients are those of the prediction, in the authors' code (github.com/Jinxu-Lin/DAS) of the mean
    of its d elements, and the score is the square of :math:`\phi(x)^T (\Phi^T \Phi + \lambda I)^{-1} \phi_i r_i`,
    with the residual r_i of example i: how large the model's error is there. The square says how far, not which way.

    Q = 1 and R = 1: see :class:`~lightning_trak.outputs.surrogate.SurrogateOutput`. So :class:`~lightning_trak.TRAK`
    gives the product without r_i. :class:`~lightning_trak.outputs.DiffusionLoss` is minus the square of r_i::

        # with DiffusionMean(alphas, timesteps); (num_targets, num_train)
        scores = trak.score(trainer, targets)
        loss = -DiffusionLoss(alphas, timesteps).output(model, train_examples)
        residuals = loss.sqrt()  # (num_train,)
        das = (scores * residuals) ** 2

    The code also scales the gradient at each timestep to length 1, and residuals over timesteps to length 1. This is
    left out.

    The arguments are those of :class:`~lightning_trak.outputs.diffusion.base.DiffusionOutput`.
    """

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean of each prediction, shape ``(batch,)``."""
        del target
        return prediction.mean(1)
