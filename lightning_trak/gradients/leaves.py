"""Checks that an output depends on the parameters of the copied module, and on no tensor outside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.compatibility import TorchDispatchMode
from lightning_trak.texts.messages import listed

_WRITE_IT_SO = (
    "attribution works on a copy of the model. A lambda, closure or partial that was made in __init__ still refers to"
    " the original: make it a method, or pass the module to the function as an argument"
)


def leaves_of(value: Tensor) -> list[Tensor]:
    """The leaves of a tensor's autograd graph, each once."""
    if value.grad_fn is None and value.requires_grad:
        return [value]
    return [node.variable for node in graph_nodes(value) if hasattr(node, "variable")]


def graph_nodes(value: Tensor) -> Iterator[Any]:
    """The nodes of a tensor's autograd graph, each once."""
    waiting, seen = [value.grad_fn], {value.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        yield node
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)


def require_own_leaves(
    value: Tensor, module: nn.Module, *others: nn.Module, made: Collection[int] = frozenset()
) -> None:
    """Check that an output is differentiable in parameters of the module, and in nothing else.

    Args:
        value: an output with its autograd graph.
        module: the copy of the user's module that computed it.
        others: modules whose parameters are constants of the output, such as those that a ModelOutput holds.
        made: addresses of tensors that the forward pass made, see :func:`apart_from`. They are allowed, since a model
            may differentiate with respect to its own input.

    Raises:
        ValueError: if another tensor that requires gradients is a leaf of the output's graph.
    """
    own = {id(parameter) for part in (module, *others) for parameter in part.parameters()}
    leaves = [leaf for leaf in leaves_of(value) if id(leaf) not in own]
    foreign = [leaf for leaf in leaves if not (_has_memory(leaf) and _address(leaf) in made)]
    if foreign:
        shapes = listed([str(tuple(leaf.shape)) for leaf in foreign])
        raise ValueError(
            f"the output of {type(module).__name__} depends on {len(foreign)} tensors that require gradients and are"
            f" not parameters of the copy that is differentiated, of shapes {shapes}. If they belong to the model:"
            f" {_WRITE_IT_SO}; also register a parameter that is in a plain list or dict. If they are constants:"
            " call requires_grad_(False) on them"
        )


@contextmanager
def apart_from(original: nn.Module | None, copied: nn.Module) -> Iterator[set[int]]:
    """Check that code for a copy of a module reads no parameters or buffers of the original module.

    Args:
        original: the user's module; None: nothing is checked.
        copied: the copy.

    Yields:
        The addresses of tensors that operations make inside this context.

    Raises:
        ValueError: if an operation reads a parameter or buffer of the original. The error names it.
    """
    if original is None:
        yield set()
        return
    own = {_address(tensor) for _, tensor in _tensors(copied)}
    names = {_address(tensor): name for name, tensor in _tensors(original)}
    with _Reading({address: name for address, name in names.items() if address and address not in own}) as reading:
        try:
            yield reading.made
        except Exception as error:  # such as tensors on two devices, since the original stays on its own
            _require_unread(reading.found, original, error)
            raise
    _require_unread(reading.found, original)


def _require_unread(found: set[str], original: nn.Module, cause: Exception | None = None) -> None:
    if found:
        raise ValueError(
            f"the output of {type(original).__name__} reads {listed(sorted(found))}"
            f" of the module that was passed, not of the copy with the checkpoint's weights: {_WRITE_IT_SO}"
        ) from cause


class _Reading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which of the named tensors operations read, and which tensors they make."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self.found: set[str] = set()
        self.made: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        read = set(_addresses((*args, *kwargs.values())))
        self.found |= {self._names[address] for address in read & self._names.keys()}
        result = func(*args, **kwargs)
        self.made.update(set(_addresses((result,))) - read)  # no views of older tensors
        return result


def _addresses(values: Iterable[Any]) -> Iterator[int]:
    """The addresses of the tensors in arguments or results of an operation, and in lists of them."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _addresses(value)
        elif _has_memory(value):
            yield _address(value)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that have their own memory."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if _has_memory(tensor):
            yield name, tensor


def _has_memory(value: Any) -> bool:
    """Whether a value is a plain strided tensor, with its own memory."""
    return type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
