"""Tensors of which code asks that gradients are tracked, where ``torch.func`` tracks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class AlreadyTracked(TorchFunctionMode):
    """Inside this context under ``torch.func.grad``, ``tensor.requires_grad_()`` changes nothing.

    Without it, the call is an error. Models of transformers make it for the inputs of their layers once gradient
    checkpointing is enabled. The gradients of parameters flow through the tensor with and without the call.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call all other operations."""
        del types
        if func is Tensor.requires_grad_ and _asked(*args[1:], **(kwargs or {})):
            return args[0]
        return func(*args, **(kwargs or {}))


def _asked(requires_grad: bool = True) -> bool:
    return requires_grad
