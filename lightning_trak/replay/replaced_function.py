"""A context in which another function takes the place of one of torch's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode
from typing_extensions import override


class ReplacedFunction(TorchFunctionMode):
    """A mode in which calls of a function of torch go to another one, with the same arguments.

    Args:
        function: of torch.
        other: what is called in its place. What it calls itself is not replaced.
    """

    def __init__(self, function: Callable[..., Any], other: Callable[..., Any]) -> None:
        super().__init__()
        self._function, self._other = function, other

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (self._other if func is self._function else func)(*args, **(kwargs or {}))
