"""Tensors that code makes under ``vmap``, so that results of examples can be written into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAKING = frozenset(
    [
        torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.zeros_like, torch.ones_like,
        torch.full_like, torch.empty_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty,
    ]
)  # fmt: skip
_RECURRENT = frozenset([torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu])


class NewTensorsOfExamples(TorchFunctionMode):
    """Inside this context under ``vmap``, each example has its own copy of the tensors that code makes.

    Without it, ``outputs = torch.zeros(...)`` belongs to all examples, and ``outputs[0] = result`` is an error. The
    same goes for the first state of a recurrent layer, which PyTorch's own code writes into.

    Args:
        like: any tensor that has a value for each example.
    """

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self._zero = torch.zeros_like(like.reshape(-1).sum())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the operation. A tensor becomes one of each example by adding zero."""
        del types
        if func in _RECURRENT:  # called with (inputs, states, ...)
            inputs, states, *others = args
            states = tuple(map(self._of_examples, states)) if isinstance(states, tuple) else self._of_examples(states)
            args = inputs, states, *others
        made = func(*args, **(kwargs or {}))
        return self._of_examples(made) if func in _MAKING and "out" not in (kwargs or {}) else made

    def _of_examples(self, tensor: Tensor) -> Tensor:
        zero = self._zero.to(tensor)
        return tensor.logical_or(zero) if tensor.dtype == torch.bool else tensor + zero
