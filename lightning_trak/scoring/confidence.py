"""Q of examples that a model has not been trained on, from a model that has been.

What an example adds to a model depends on its loss before it was added. A model is surer of the examples that it was
trained on than one that has not seen them, or has seen half of the data. So outputs f are multiplied by a confidence c
below 1 before the loss is differentiated: for a margin, c is an inverse temperature (Guo et al. 2017, arXiv
1706.04599). The form and the values of c were found by measurement: docs/faithfulness.md has the evidence.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Literal

from torch import Tensor

from lightning_trak.outputs import ModelOutput
from lightning_trak.scoring.damping import Damping, Noise

Confidence = float | Literal["auto"]


@dataclass(frozen=True)
class Confident:
    """Q = -dl/df at c f.

    Attributes:
        output: gives l.
        confidence: c; ``"auto"`` is :attr:`~lightning_trak.scoring.damping.Noise.confidence`.
    """

    output: ModelOutput
    confidence: Confidence

    @property
    def automatic(self) -> bool:
        """Whether c is chosen from the training examples at all checkpoints."""
        return self.confidence == "auto"

    def factor(self, noise: Noise | None) -> float:
        """C.

        Args:
            noise: of all training examples; needed if c is chosen from them.
        """
        if self.confidence != "auto":
            return float(self.confidence)
        assert noise is not None
        return noise.confidence

    def loss_gradients(self, outputs: Tensor, factor: float) -> Tensor:
        """Q of training examples.

        Args:
            outputs: f.
            factor: c.

        Returns:
            Of the same shape.
        """
        return self.output.derivatives(factor * outputs)[0]


def confident(
    output: ModelOutput, confidence: Confidence | None, damping: Damping, loss_gradients: str
) -> Confident | None:
    """What gives Q in the place of the stored one; None if the stored one is it.

    Args:
        output: gives l.
        confidence: c; None: "auto" where the damping is, too, and Q is not averaged apart, else 1.
        damping: the damping.
        loss_gradients: how Q is averaged over checkpoints.
    """
    if confidence is None:
        confidence = "auto" if damping == "auto" and loss_gradients != "averaged" else 1.0
    return None if confidence == 1 else Confident(output, confidence)


def require_confidence(confidence: Confidence | None, loss_gradients: str) -> Confidence | None:
    """The confidence, if it is one or None.

    Args:
        confidence: c.
        loss_gradients: how Q is averaged over checkpoints.

    Raises:
        ValueError: if it is not above 0 and at most 1, or another word than "auto", or not 1 where Q is averaged apart.
    """
    if confidence is None:
        return None
    number = isinstance(confidence, Real) and not isinstance(confidence, bool) and 0 < confidence <= 1
    if confidence != "auto" and not number:
        raise ValueError(f"confidence must be above 0 and at most 1, or 'auto'; got {confidence!r}")
    if confidence != 1 and loss_gradients == "averaged":
        raise ValueError(
            f"confidence={confidence!r} needs loss_gradients='per_checkpoint': as published, Q is averaged as it is"
        )
    return confidence
