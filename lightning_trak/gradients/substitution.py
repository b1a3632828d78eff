"""Replaces parameters by other tensors wherever a forward pass uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Substituted(TorchFunctionMode):
    """Inside this context, operations get replacements for some tensors.

    ``torch.func.functional_call`` replaces a module's attributes. It misses a parameter that is also in a list, a
    dictionary or a closure. Here a tensor is found by its identity, so it does not matter how the code reaches it.

    Args:
        pairs: pairs of a tensor and its replacement.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._pairs = {id(original): (original, other) for original, other in pairs}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the operation with tensors in its arguments replaced."""
        del types
        return func(*map(self._other, args), **{name: self._other(value) for name, value in (kwargs or {}).items()})

    def _other(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._pairs.get(id(value), (None, value))[1]
        if type(value) in (list, tuple):
            return type(value)(map(self._other, value))
        return value
