"""Curvature of each prediction of its own, for losses that add up several predictions for an example.

The loss of a text adds up those of its tokens, l_j = sum_t a_jt (-log p_jt). Each token is a classification, with its
margin m_jt and R_jt = p_jt (1 - p_jt). The Gauss-Newton matrix of all of them is

    sum_j sum_t a_jt^2 R_jt g_jt g_jt^T,    g_jt = dm_jt/dtheta.

It has a rank of many predictions for each example, and to store them all would take as many rows of features. One row
for each example is enough: d_j = sum_t s_jt a_jt R_jt^(1/2) g_jt with random signs s. The mean of d_j d_j^T over the
signs is the sum above, since products of different predictions cancel (Hutchinson 1990, A stochastic estimator of the
trace, has such signs). What is left of them averages out over the examples. With one prediction, d_j d_j^T is R_j g_j
g_j^T itself.

K is a mean of this matrix and of the one in which an example is a single prediction, with the whole output f_j. In the
latter, the predictions for an example have all their errors in common; in the former they have none:

    K = c sum_j R_j phi_j phi_j^T + (1 - c) sum_j d_j d_j^T.

That both are better than one, c, and the damping that suits them were found by measurement: docs/faithfulness.md has
the evidence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.predictions import SeveralPredictions
from lightning_trak.projections.philox import Stream, signs
from lightning_trak.running.data.annotated import AnnotatedBatch

WHOLE = 0.1  # c
SEVERAL = 0.5  # what the automatic damping is multiplied by
_SIGNS = 128  # in a block of random words


class PredictionCurvature(ModelOutput):
    """The output whose gradient at a training example is d_j.

    Its value says how well the model fits the labels of the example, beside what its probabilities say: u_j = sum_t
    a_jt^2 Q_jt^2 / sum_t a_jt^2 (Q_jt^2 + R_jt), with Q_jt = 1 - p_jt. See :func:`dispersion`. R is 1.

    Args:
        output: the output of the training examples.
        seed: of the signs. They depend on the position of an example, and not on the rest of its batch.
    """

    numbered = True

    def __init__(self, output: SeveralPredictions, seed: int) -> None:
        self.of = output
        self.seed = seed

    def output(self, module: nn.Module, batch: AnnotatedBatch) -> Tensor:
        """u_j with the gradient d_j, shape ``(batch,)``; NaN where the given output is."""
        margins, weights = self.of.predictions(module, batch.batch)
        fixed = margins.detach()
        wrong = (-fixed).sigmoid()  # 1 - p would lose all digits as p nears 1
        curvatures = fixed.sigmoid() * wrong
        total = (margins * weights * curvatures.sqrt() * self._signs(batch.notes[:, 0], weights)).sum(-1)
        squares, variances = ((weights.square() * column).sum(-1) for column in (wrong.square(), curvatures))
        return total - total.detach() + squares / (squares + variances)

    def loss(self, output: Tensor) -> Tensor:
        """Half the square, shape ``(batch,)``."""
        return output.square() / 2

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Why the given output is NaN."""
        return self.of.explain_nan(module, batch.batch)

    def _signs(self, positions: Tensor, weights: Tensor) -> Tensor:
        """-1 or 1 for each prediction, which has its number among those of its example that count: padding has none.

        Args:
            positions: of the examples, shape ``(batch,)``.
            weights: of the predictions, shape ``(batch, predictions)``.
        """
        stream = Stream.derive("predictions", self.seed, 0, "")
        words = stream.words(positions, -(-weights.shape[1] // _SIGNS)).flatten(1)
        numbers = ((weights != 0).cumsum(-1) - 1).clamp(min=0)
        return signs(words, weights.dtype).gather(1, numbers)


def dispersion(values: Tensor) -> float:
    """The dispersion of single predictions, sum Q^2 / sum R, see :mod:`~lightning_trak.scoring.newton.noise`.

    Each example counts alike, so that a few with wrong labels do not decide.

    Args:
        values: u_j of :class:`PredictionCurvature` at some examples, shape ``(n,)``.
    """
    mean = float(values.double().mean())
    return min(max(mean / max(1 - mean, 1e-6), 0.01), 1.0)
