"""The point where the backward pass hands over a layer's input and its output's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Tap(torch.autograd.Function):
    """The identity, in place, on a layer's output.

    In place, so that what follows may itself work in place. The input is saved by autograd, which notices if it was
    overwritten, and which activation checkpointing can then discard and recompute.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, activation: Tensor, receive: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """Return ``output``, which depends on ``anchor`` from now on: that is what makes the backward pass come by.

        Args:
            ctx: autograd's context.
            output: the layer's output.
            anchor: a leaf that requires a gradient, and never gets one.
            activation: the layer's input.
            receive: called in the backward pass with the input and the gradient of the output.
        """
        del anchor  # an edge in autograd's graph is all it is for
        ctx.mark_dirty(output)
        ctx.save_for_backward(activation)
        ctx.receive = receive
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Hand over, and pass the gradient on."""
        (activation,) = ctx.saved_tensors
        ctx.receive(activation, gradient)
        return gradient, None, None, None
