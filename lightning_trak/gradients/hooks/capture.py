"""Forward hooks, and an autograd function that captures the gradient of a layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ForwardHook = Callable[..., Tensor | None]  # (module, args, kwargs, output) -> another output, or None


@contextmanager
def attached(modules: Iterable[nn.Module], hook: ForwardHook) -> Iterator[None]:
    """Inside this context, call ``hook`` after each module's forward, before the user's own forward hooks."""
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


class CaptureOutputGradient(torch.autograd.Function):
    """The identity on a layer's output, in place. Its backward captures the gradient of this output.

    It works in place, so that operations after it may work in place, too. Autograd saves the layer's input. So autograd
    notices if the input was overwritten, and activation checkpointing can discard and recompute it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        anchor: Tensor,
        inputs: Tensor,
        receive: Callable[[Tensor, Tensor], None],
        input_gradient: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return ``output``, which now depends on ``anchor``, so that the backward pass reaches it.

        Args:
            ctx: autograd's context.
            output: the layer's output.
            anchor: a leaf that requires a gradient but never gets one.
            inputs: the layer's input.
            receive: called in the backward pass with the layer's input and the gradient of its output.
            input_gradient: gives the gradient of ``inputs`` for a gradient of ``output``, which then depends on them
                here alone; None: autograd has recorded how the output depends on them.
        """
        del anchor  # only its edge in autograd's graph is needed
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs)
        ctx.receive, ctx.input_gradient = receive, input_gradient
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor | None, None, None]:
        """Call ``receive``, and pass the gradient on."""
        (inputs,) = ctx.saved_tensors
        ctx.receive(inputs, gradient)
        own = ctx.input_gradient is not None and ctx.needs_input_grad[2]
        return gradient, None, ctx.input_gradient(gradient) if own else None, None, None
