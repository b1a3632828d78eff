"""The noise-prediction loss of a diffusion model."""

from __future__ import annotations

from torch import Tensor

from lightning_trak.outputs.diffusion.base import DiffusionOutput
from lightning_trak.outputs.linear import LinearLossOutput


class DiffusionLoss(DiffusionOutput, LinearLossOutput):
    r"""The negative noise-prediction loss at given timesteps.

    .. math:: f = -\mathrm{mean}_{t, \epsilon} |\epsilon_\theta(x_t, t) - \epsilon|^2 / d

    is minus the simple loss of Ho et al. 2020 (arXiv 2006.11239, equation 14), with the mean over the d elements of an
    example. Its scores are those of TRAK for diffusion models; those of
    :class:`~lightning_trak.outputs.DiffusionSquare` predict the effect of training examples better (Zheng et al. 2024,
    arXiv 2311.00500). Q = 1, and R is set to 1: see :class:`~lightning_trak.outputs.linear.LinearLossOutput`.

    Training draws other timesteps and noises, so give :class:`~lightning_trak.methods.Metagradient` the training losses
    by ``losses=``.

    The arguments are those of :class:`~lightning_trak.outputs.diffusion.base.DiffusionOutput`.
    """

    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The negative mean squared error of each prediction, shape ``(batch,)``."""
        return -(prediction - target).square().mean(1)
