"""Values of tensors that Python code asks for under ``vmap``, where each example may have its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_trak.compatibility import outside_vmap, values_under_vmap

_ASKING = frozenset(
    [
        Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__, Tensor.item,
        Tensor.tolist, Tensor.__format__, Tensor.is_nonzero, Tensor.equal, Tensor.allclose, torch.is_nonzero,
        torch.equal, torch.allclose,
    ]
)  # fmt: skip


# What vmap says about values of a tensor in the place of a size, and about results whose shape depends on values.
_NEEDING = ("calling .item() on a Tensor", "dynamic shape", "to vmap over `mask` in torch.masked_select")


class DifferentValues(Exception):  # noqa: N818
    """Python code has asked for a value that is not the same for all examples.

    Args:
        groups: the numbers of the examples with one value, for each value.
    """

    def __init__(self, groups: list[list[int]]) -> None:
        super().__init__(
            "the forward pass asks for a value, such as .item() or a mask as an index, and most of the examples have"
            " different ones"
        )
        self.groups = groups


class CommonValues(TorchFunctionMode):
    """Inside this context, Python code under ``vmap`` gets a value of a tensor that is the same for all examples.

    Without it, ``if mask.all():`` and ``.item()`` are errors under ``vmap``. Models of transformers look in this way
    whether a batch has padding at all. If all examples have the same value, all of them take the same path through the
    code, and the value is what each of them would have alone. The same goes for sizes, and for masks and indices where
    the shape of the result depends on them.

    Raises:
        DifferentValues: if examples have different values. Those with the same value can be mapped over together.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Give the value of the first example where one is needed, if it is that of all."""
        del types
        kwargs = kwargs or {}
        if func in _ASKING:
            return func(*(_common(part) if isinstance(part, Tensor) else part for part in args), **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not any(words in str(error) for words in _NEEDING):
                raise
            if func is Tensor.__setitem__ and _fills(*args[1:]):
                tensor, mask, value = args
                return tensor.masked_fill_(mask.reshape(*mask.shape, *[1] * (tensor.ndim - mask.ndim)), value)
            return func(*_with_common(args), **{name: _with_common(part) for name, part in kwargs.items()})


def _fills(index: Any, value: Any) -> bool:
    """Whether ``tensor[index] = value`` writes a number where a mask is true, which needs no values of the mask."""
    return isinstance(index, Tensor) and index.dtype == torch.bool and isinstance(value, (int, float))


def _with_common(part: Any) -> Any:
    """Arguments in which integers and masks have their values. No gradient flows through them."""
    if isinstance(part, Tensor) and not part.is_floating_point() and not part.is_complex():
        return _common(part)
    if type(part) in (list, tuple):
        return type(part)(map(_with_common, part))
    if isinstance(part, slice):
        return slice(*map(_with_common, (part.start, part.stop, part.step)))
    return part


def _common(tensor: Tensor) -> Tensor:
    """The value of a tensor that is the same for all examples.

    Raises:
        DifferentValues: if it is not.
    """
    with outside_vmap():
        values = values_under_vmap(tensor)
        if values is None:
            return tensor
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, row in enumerate(values.reshape(len(values), -1).tolist()):
            groups.setdefault(tuple(row), []).append(number)
        if len(groups) > 1:
            raise DifferentValues(list(groups.values()))
        return values[0]
