"""Forward hooks, and the point where the backward pass gives a layer's output gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ForwardHook = Callable[..., Tensor | None]  # (module, args, kwargs, output) -> another output, or None


@contextmanager
def attached(modules: Iterable[nn.Module], hook: ForwardHook) -> Iterator[None]:
    """Call ``hook`` after the forward of each module, before the user's own hooks; it is removed at the end."""
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class CaptureOutputGradient(torch.autograd.Function):
    """The identity, in place, on a layer's output; its backward captures the gradient of that output.

    In place, so that what follows may itself work in place. The layer's input is saved by autograd, which notices if it
    was overwritten, and which activation checkpointing can then discard and recompute.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, anchor: Tensor, inputs: Tensor, receive: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        """Return ``output``, which depends on ``anchor`` from now on: so the backward pass must reach it.

        Args:
            ctx: autograd's context.
            output: the layer's output.
            anchor: a leaf that requires a gradient, and never gets one.
            inputs: the layer's input.
            receive: called in the backward pass with the layer's input and the gradient of its output.
        """
        del anchor  # it is needed as an edge in autograd's graph only
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs)
        ctx.receive = receive
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Call ``receive``, and pass the gradient on."""
        (inputs,) = ctx.saved_tensors
        ctx.receive(inputs, gradient)
        return gradient, None, None, None
