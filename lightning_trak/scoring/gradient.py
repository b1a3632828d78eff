"""Similarities of gradients: products or cosines, summed over checkpoints."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.scoring.base import Scorer

EffectOn = Literal["loss", "output"]


class GradientDotScorer(Scorer):
    r"""score(x)_i = sum_m c_m <g_m(x), g_m(i)>, for features that estimate products of gradients.

    A positive score says that training on i *lowers the loss* at x, or with ``effect_on="output"`` that it *raises the
    output*. The unit is that of the loss or of the output, for steps of size c_m. g(i) = Q_i phi_i is minus the
    gradient of the loss at the training example: the direction in which a step of gradient descent on i moves the
    parameters. g(x) is minus the gradient of the loss at the target, or the gradient of its output.

    Args:
        store: complete features of the training set.
        checkpoint_weights: c_m.
        effect_on: ``"loss"``: g(x) = Q_x phi_x, the classical methods; ``"output"``: g(x) = phi_x. At one checkpoint
            the two differ by the factor Q_x of each target, which is negative where the loss rises with the output.
    """

    def __init__(self, store: FeatureStore, checkpoint_weights: Sequence[float], effect_on: EffectOn) -> None:
        super().__init__(store)
        self.checkpoint_weights = checkpoint_weights
        self.effect_on: EffectOn = effect_on

    def directions(self, checkpoint: int, targets: Features) -> Tensor:
        """c_m g_m(x) of each target, ``(num_targets, k)``."""
        features = self._working(targets.features)
        loss_gradients = targets.loss_gradients if self.effect_on == "loss" else torch.ones_like(targets.loss_gradients)
        scales = self.checkpoint_weights[checkpoint] * self._scales(features, loss_gradients.to(self._device))
        return features * scales.to(features).unsqueeze(1)

    def weights(self, checkpoint: int, rows: Features) -> Tensor:
        """The factor that turns the features of each training example into g, ``(n,)``."""
        return self._scales(rows.features, rows.loss_gradients.to(self._device))

    def _scales(self, features: Tensor, loss_gradients: Tensor) -> Tensor:
        return loss_gradients


class GradientCosineScorer(GradientDotScorer):
    """score(x)_i = sum_m c_m cos(g_m(x), g_m(i)): :class:`GradientDotScorer` of gradients of length 1.

    Scores are from -1 to 1, times the sum of c_m, with the signs of :class:`GradientDotScorer`. An example whose
    gradient is zero has scores of 0.
    """

    def _scales(self, features: Tensor, loss_gradients: Tensor) -> Tensor:
        # In float64, because squares of small gradients underflow in float32.
        norms = torch.linalg.vector_norm(features, dim=1, dtype=torch.float64)
        return torch.where(norms > 0, loss_gradients.sign() / norms, 0.0)
