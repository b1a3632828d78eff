"""Q of examples that a model has not been trained on, from a model that has been.

What an example adds to a model depends on its loss before it was added. A model is surer of the examples that it was
trained on than one that has not seen them, or has seen half of the data. So outputs f are multiplied by a confidence c
below 1 before the loss is differentiated: for a margin, c is an inverse temperature (Guo et al. 2017, arXiv
1706.04599). The form and the values of c were found by measurement: docs/faithfulness.md has the evidence.
"""

import math
from numbers import Real

from torch import Tensor

from lightning_trak.outputs import ModelOutput


class Confidence:
    """Q = -dl/df at c f.

    Args:
        output: gives l.
        factor: c.
    """

    def __init__(self, output: ModelOutput, factor: float) -> None:
        self.output, self.factor = output, factor

    def loss_gradients(self, outputs: Tensor) -> Tensor:
        """Q of training examples with these outputs f: of the same shape."""
        return self.output.derivatives(self.factor * outputs)[0].to(outputs.device)


def require_confidence(confidence: float, loss_gradients: str) -> float:
    """The confidence, if it is one.

    Args:
        confidence: c.
        loss_gradients: how Q is averaged over checkpoints.

    Raises:
        ValueError: if it is not above 0 and at most 1, or not 1 where Q is averaged apart.
    """
    real = isinstance(confidence, Real) and not isinstance(confidence, bool)
    if not real or not 0 < confidence <= 1 or math.isnan(confidence):
        raise ValueError(f"confidence must be above 0 and at most 1, got {confidence!r}")
    if confidence != 1 and loss_gradients == "averaged":
        raise ValueError(
            f"confidence={confidence:g} needs loss_gradients='per_checkpoint': what was published averages Q as it is"
        )
    return float(confidence)
