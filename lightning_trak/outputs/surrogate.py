"""What outputs share through which the training loss does not depend on the parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_trak.outputs.base import ModelOutput


class SurrogateOutput(ModelOutput):
    """Base of the outputs f that do not determine the training loss.

    Where a formula asks for the derivatives of the loss, -f takes its place, with R = 1: Q = 1 and R = 1. What needs
    the training loss itself is refused.
    """

    def loss(self, output: Tensor) -> Tensor:
        """Not known.

        Raises:
            TypeError: always.
        """
        del output
        raise TypeError(
            f"the training loss is not a function of {type(self).__name__}, and what you call needs it: give"
            " Metagradient the training losses by losses=, or use another curvature than 'exact', or an output that"
            " determines the loss"
        )

    def derivatives(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Q = 1 and R = 1: see the class."""
        with torch.inference_mode(False):
            ones = torch.ones_like(output, dtype=torch.promote_types(output.dtype, torch.float32))
            return ones, ones.clone()
