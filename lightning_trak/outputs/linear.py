"""What outputs share that are the negative of the training loss."""

from __future__ import annotations

from torch import Tensor

from lightning_trak.outputs.base import ModelOutput


class LinearLossOutput(ModelOutput):
    """Base of the outputs f with the training loss l = -f.

    As a function of f the loss is linear: Q = 1, and R = 0, which leaves a Gauss-Newton matrix of nothing. R is
    therefore set to 1: the Gram matrix becomes the empirical Fisher, the sum of outer products of loss gradients. It
    weighs badly fitted examples most and can be far from the curvature (Kunstner et al. 2019, arXiv 1905.12558; Martens
    2020, arXiv 1412.1193).
    """

    averages = True  # nothing says what a loss is a mean of

    def loss(self, output: Tensor) -> Tensor:
        """The loss itself, shape ``(batch,)``."""
        return -output

    def derivatives(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Q = 1, and R = 1 in place of the second derivative, which is 0: see the class."""
        slope, curvature = super().derivatives(output)
        return slope, curvature.fill_(1.0)
