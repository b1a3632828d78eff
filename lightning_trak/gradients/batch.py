"""Batches of any structure as lists of examples. Gradient engines use this to take single examples out of a batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_trak.running.data.loading import LEAVES_OUT
from lightning_trak.running.data.singles import Singles

Path = tuple[Any, ...]
# The kind of a part of a batch: a tensor with a row for each example, a list with an item for each example, a part that
# all examples share, or the number of examples.
Kind = Literal["rows", "items", "shared", "count"]
Layout = Mapping[Path, Kind]

_PLAIN = (str, bytes, int, float, complex, type(None))


def find_layout(two: Any, three: Any) -> dict[Path, Kind]:
    """Find out which parts of a batch belong to single examples.

    Sizes alone do not show this: a list of three class names in a batch of three examples belongs to none of them. So a
    batch of two examples is compared with a batch of three. A part that grows has an entry for each example.

    Args:
        two: a batch that holds the same example twice.
        three: a batch that holds the same example three times.

    Returns:
        The kind of each tensor and list, by its path in the batch.

    Raises:
        ValueError: if a tensor grows in a dimension other than the first, or by another factor, or is not dense.
    """
    return dict(_kinds((), two, three))


# Functions that visit a batch part by part are not nested in others. A nested function that calls itself holds itself,
# and with it the batch, until Python's garbage collector comes. That takes memory of a GPU. And if the collector comes
# in a forked worker of a DataLoader, CUDA aborts the worker.


def _kinds(path: Path, a: Any, b: Any) -> Iterator[tuple[Path, Kind]]:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        _require_dense(path, a)
        yield path, _kind_of_tensor(path, a, b)
    elif type(a) is int and (a, b) == (2, 3):
        yield path, "count"
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and (len(a), len(b)) == (2, 3):
        yield path, "items"
    elif not isinstance(a, _PLAIN) and type(a) is type(b):
        yield path, "shared"  # the container itself; each part in it has its own entry
        parts = dict(_children(b))
        for key, part in _children(a):
            if key in parts:
                yield from _kinds((*path, key), part, parts[key])


def _require_dense(path: Path, tensor: Tensor) -> None:
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else "sparse"
        raise ValueError(
            f"{_named(path)} is a {kind} tensor, which cannot be taken apart into examples: let the collate_fn give a"
            " padded or dense tensor with the examples in the first dimension, and the model convert it"
        )


def _kind_of_tensor(path: Path, a: Tensor, b: Tensor) -> Kind:
    if a.ndim == b.ndim > 0 and (len(a), len(b)) == (2, 3):
        return "rows"
    if a.ndim == b.ndim and (a.ndim == 0 or len(a) == len(b)):
        grows = [dim for dim in range(1, a.ndim) if (a.shape[dim], b.shape[dim]) == (2, 3)]
        if not grows:
            return "shared"
    raise ValueError(
        f"{_named(path)} has shape {tuple(a.shape)} in a batch of two examples and {tuple(b.shape)} in a batch of"
        " three; expected the examples in the first dimension: change the collate_fn"
    )


@dataclasses.dataclass(frozen=True)
class ExampleBatch:
    """A batch of examples. User code gets copies only, made by :meth:`fresh`.

    The user's code may remove keys from its batch or change tensors in place. The next pass over the batch must not see
    these changes.

    Args:
        content: what the collate function and the batch transfer hooks returned.
        size: the number of examples.
        layout: the kinds of the batch's parts, see :func:`find_layout`; None if they are not known. Then each tensor
            must have ``size`` rows, one for each example. A list of ``size`` texts or numbers is then refused, since it
            may belong to the examples or to the whole batch.
    """

    content: Any
    size: int
    layout: Layout | None = None

    def take(self, rows: Sequence[int] | slice) -> ExampleBatch:
        """Some of the examples, in the batch's own structure.

        Raises:
            ValueError: if the number of rows of a part is not the number of examples.
            TypeError: if the batch holds an object that cannot be split into examples.
        """
        numbers = list(range(self.size)[rows]) if isinstance(rows, slice) else list(rows)

        def pick(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return type(part)([part[number] for number in numbers])
            return part[rows] if isinstance(rows, slice) else part[torch.tensor(numbers, device=part.device)]

        return ExampleBatch(self.rebuild(pick, len(numbers)), len(numbers), self.layout)

    @property
    def is_one_by_one(self) -> bool:
        """Whether each example is in a batch of its own, because the collate function's batches cannot be split."""
        return isinstance(self.content, Singles)

    def fresh(self) -> Any:
        """A copy of the whole batch. It holds no inference tensors, since autograd cannot save them.

        Raises:
            ValueError: if there are several examples, each in a batch of its own.
        """
        self._require_together()
        return _copied(self.content[0]) if self.is_one_by_one else self.rebuild(_copied)

    def rows(self) -> list[Tensor]:
        """The tensors that have a row for each example, in a fixed order.

        Raises:
            TypeError: if a list has an item for each example.
        """
        found: list[Tensor] = []

        def collect(part: Any) -> Any:
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"vmap cannot map over the list of {type(part[0]).__name__} in the batch; if the model does not"
                    " need it, let the collate_fn leave it out, or else use engine='loop'"
                )
            found.append(part)
            return part

        self.rebuild(collect)
        return found

    def shapes(self) -> tuple[Any, ...]:
        """The shapes of all tensors of the batch."""
        self._require_together()
        return self.size, *_shapes(self.content)

    def _require_together(self) -> None:
        if self.is_one_by_one and self.size > 1:
            raise ValueError(
                "the collate function joins examples so that they cannot be taken apart again, as it joins graphs; so"
                " each is in a batch of its own, but several in one batch are needed here: use engine='auto' or 'loop',"
                " or a method that takes examples one by one, such as TRAK"
            )

    def rebuild(self, of_examples: Callable[[Any], Any], count: int | None = None) -> Any:
        """A copy of the batch in which every part that belongs to single examples is replaced.

        Mappings, (named) tuples, lists and dataclasses can be nested.

        Args:
            of_examples: called with each tensor of shape ``(size, ...)`` and each list of ``size`` items; returns what
                replaces it.
            count: the number of examples in the result, for parts that hold this number; default: it stays the same.
        """
        return self._rebuilt((), self.content, of_examples, count)

    def _rebuilt(self, path: Path, part: Any, of_examples: Callable[[Any], Any], count: int | None) -> Any:
        if self._belongs_to_examples(path, part):
            return of_examples(part)
        if type(part) is int and self.layout is not None and self.layout.get(path) == "count":
            return part if count is None else count
        if isinstance(part, (Tensor, *_PLAIN)):
            return _copied(part)
        return _with_children(
            part, {key: self._rebuilt((*path, key), child, of_examples, count) for key, child in _children(part)}
        )

    def _belongs_to_examples(self, path: Path, part: Any) -> bool:
        kind = self.layout.get(path) if self.layout is not None else None
        if isinstance(part, Tensor):
            if part.ndim == 0 or kind == "shared":
                return False
            if len(part) != self.size:
                raise ValueError(
                    f"{_named(path)} has shape {tuple(part.shape)} in a batch of {self.size} examples; expected"
                    f" {self.size} as its first dimension (or no dimension, for a value that all examples share):"
                    f" {LEAVES_OUT if len(part) < self.size else 'change the collate_fn'}"
                )
            return True
        if not isinstance(part, (list, tuple)) or kind == "shared":
            return False
        if kind == "items":
            if len(part) != self.size:
                raise ValueError(
                    f"{_named(path)} has {len(part)} items in a batch of {self.size} examples; expected one for each:"
                    f" {LEAVES_OUT if len(part) < self.size else 'change the collate_fn'}"
                )
            return True
        if len(part) == self.size > 1 and all(isinstance(item, _PLAIN) for item in part):
            raise ValueError(
                f"{_named(path)} has as many items as the batch has examples. It is not clear whether each item belongs"
                " to one example or to all of them: make it a tensor, or leave it out of the batch"
            )
        return False


def _shapes(part: Any) -> Iterator[torch.Size]:
    if isinstance(part, Tensor):
        yield part.shape
    elif not isinstance(part, _PLAIN):
        for _, child in _children(part):
            yield from _shapes(child)


def _is_container(part: Any) -> bool:
    return isinstance(part, (Mapping, list, tuple)) or (dataclasses.is_dataclass(part) and not isinstance(part, type))


def _children(part: Any) -> Iterator[tuple[Any, Any]]:
    """The parts of a container, by key, position or field."""
    if isinstance(part, Mapping):
        yield from part.items()
    elif isinstance(part, (list, tuple)):
        yield from enumerate(part)
    elif dataclasses.is_dataclass(part) and not isinstance(part, type):
        yield from ((field.name, getattr(part, field.name)) for field in dataclasses.fields(part) if field.init)
    else:
        raise TypeError(
            f"cannot take examples out of a {type(part).__name__} in the batch; expected tensors, lists of strings or"
            " numbers, and mappings, tuples or dataclasses of them"
        )


def _with_children(part: Any, children: dict[Any, Any]) -> Any:
    """A container like the given one with other parts."""
    if isinstance(part, Mapping):
        if not isinstance(part, MutableMapping):
            return children
        rebuilt = copy.copy(part)  # keeps the type: BatchEncoding, OrderedDict, ...
        rebuilt.update(children)
        return rebuilt
    if isinstance(part, (list, tuple)):
        return type(part)(*children.values()) if hasattr(part, "_fields") else type(part)(children.values())
    return dataclasses.replace(part, **children)


def _copied(part: Any) -> Any:
    """A copy that user code may change. The part may have any structure; unknown objects are copied deeply."""
    if isinstance(part, Tensor):
        return part.clone()
    if isinstance(part, _PLAIN):
        return part
    try:
        children = list(_children(part))
    except TypeError:
        return copy.deepcopy(part)
    return _with_children(part, {key: _copied(child) for key, child in children})


def _named(path: Path) -> str:
    """The name of a part of a batch in errors."""
    return "the batch" if not path else "batch" + "".join(f"[{key!r}]" for key in path)


def infer_batch_size(batch: Any, layout: Layout | None = None) -> int:
    """The number of examples in a batch: the length of its first part that belongs to single examples.

    Args:
        batch: what the collate function returned.
        layout: the kinds of the batch's parts; None if they are not known. Then the first tensor with a dimension
            is used.

    Raises:
        ValueError: if the batch has no such part.
    """
    for size in _sizes((), batch, layout or {}):
        return size
    raise ValueError(f"cannot tell how many examples a {type(batch).__name__} without tensors holds")


def _sizes(path: Path, part: Any, layout: Layout) -> Iterator[int]:
    kind = layout.get(path)
    if isinstance(part, Tensor):
        if part.ndim > 0 and kind != "shared":
            yield len(part)
    elif kind == "items":
        yield len(part)
    elif _is_container(part):
        for key, child in _children(part):
            yield from _sizes((*path, key), child, layout)
