"""Other tensors in the place of parameters, wherever a forward pass uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Substituted(TorchFunctionMode):
    """While this context is open, operations get other tensors in place of some.

    ``torch.func.functional_call`` swaps a module's attributes, and misses a parameter that is also kept in a list, a
    dictionary or a closure. Here a tensor is known by its identity, so that it does not matter how code reaches it.

    Args:
        pairs: tensors, each with the one that takes its place.
    """

    def __init__(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._pairs = {id(original): (original, other) for original, other in pairs}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call the operation on what its arguments stand for."""
        del types
        return func(*map(self._other, args), **{name: self._other(value) for name, value in (kwargs or {}).items()})

    def _other(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._pairs.get(id(value), (None, value))[1]
        if type(value) in (list, tuple):
            return type(value)(map(self._other, value))
        return value
