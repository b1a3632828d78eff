"""Tensors that code makes under ``vmap``, so that results of examples can be written into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAKING = frozenset(
    [
        torch.zeros, torch.ones, torch.full, torch.empty, torch.zeros_like, torch.ones_like, torch.full_like,
        torch.empty_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty,
    ]
)  # fmt: skip


class NewTensorsOfExamples(TorchFunctionMode):
    """Inside this context under ``vmap``, each example has its own copy of the tensors that code makes.

    Without it, ``outputs = torch.zeros(...)`` belongs to all examples, and ``outputs[0] = result`` is an error.

    Args:
        like: any tensor that has a value for each example.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self._zero = torch.zeros_like(like.reshape(-1).sum())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the operation. A new tensor becomes one of each example by adding zero."""
        del types
        made = func(*args, **(kwargs or {}))
        if func not in _MAKING or "out" in (kwargs or {}):
            return made
        zero = self._zero.to(made)
        return made.logical_or(zero) if made.dtype == torch.bool else made + zero
