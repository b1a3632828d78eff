"""Q of examples that a model has not been trained on, from a model that has been.

What an example adds to a model depends on its loss before it was added. A model is surer of the examples that it was
trained on than one that has not seen them, or has seen half of the data. So outputs f are divided by a temperature T
above 1 before the loss is differentiated, as margins are to calibrate a classifier (Guo et al. 2017, arXiv 1706.04599).
That this is done, and the values of T, were found by measurement: docs/faithfulness.md has the evidence.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from lightning_trak.checks import number_or_auto
from lightning_trak.outputs import ModelOutput
from lightning_trak.scoring.damping import Damping
from lightning_trak.scoring.newton.noise import Noise

Temperature = float | Literal["auto"]


@dataclass(frozen=True)
class Tempered:
    """Q = -dl/df at f / T.

    Attributes:
        output: gives l.
        temperature: T; ``"auto"`` is :attr:`~lightning_trak.scoring.newton.noise.Noise.temperature`.
    """

    output: ModelOutput
    temperature: Temperature

    @property
    def automatic(self) -> bool:
        """Whether T is chosen from the training examples at all checkpoints."""
        return self.temperature == "auto"

    def settled(self, noise: Noise | None) -> "Tempered":
        """The same with a number.

        Args:
            noise: of all training examples; needed if T is chosen from them.
        """
        if self.temperature != "auto":
            return self
        assert noise is not None
        return replace(self, temperature=noise.temperature)

    def loss_gradients(self, outputs: Tensor) -> Tensor:
        """Q of training examples, if T is a number.

        Args:
            outputs: f.

        Returns:
            Of the same shape.
        """
        return self.output.derivatives(outputs / float(self.temperature))[0]


def tempered(
    output: ModelOutput, temperature: Temperature | None, damping: Damping, loss_gradients: str
) -> Tempered | None:
    """What gives Q in the place of the stored one; None if the stored one is it.

    Args:
        output: gives l.
        temperature: T; None: "auto" where the damping is, too, and Q is not averaged apart, else 1.
        damping: the damping.
        loss_gradients: how Q is averaged over checkpoints.
    """
    if temperature is None:
        temperature = "auto" if damping == "auto" and loss_gradients != "averaged" else 1.0
    return None if temperature == 1 else Tempered(output, temperature)


def require_temperature(temperature: Temperature | None, loss_gradients: str) -> Temperature | None:
    """The temperature, if it is one or None.

    Args:
        temperature: T.
        loss_gradients: how Q is averaged over checkpoints.

    Raises:
        ValueError: if it is less than 1 or infinite, or another word than "auto", or not 1 where Q is averaged apart.
    """
    if temperature is None:
        return None
    temperature = number_or_auto("temperature", temperature, 1)
    if temperature != 1 and loss_gradients == "averaged":
        raise ValueError(
            f"temperature={temperature!r} needs loss_gradients='per_checkpoint': as published, Q is averaged as it is"
        )
    return temperature
