"""Batches of any structure, seen as a list of examples: what the gradient engines need to take one apart."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from torch import Tensor

_SHARED_LEAVES = (str, bytes, int, float, complex, type(None))


def map_batch(batch: Any, size: int, on_tensor: Callable[[Tensor], Any], on_list: Callable[[Any], Any]) -> Any:
    """Rebuild a batch with every per-example leaf replaced.

    Tensors with a first dimension are per-example, and so are flat lists of ``size`` strings or numbers;
    zero-dimensional tensors, strings and numbers are shared by the whole batch. Mappings, (named) tuples, lists and
    dataclasses nest.

    Args:
        batch: what the collate function returned.
        size: number of examples in the batch.
        on_tensor: called with each per-example tensor, shape ``(size, ...)``.
        on_list: called with each per-example list of length ``size``.

    Raises:
        ValueError: if a tensor's first dimension is not ``size``.
        TypeError: if the batch holds an object that cannot be taken apart.
    """

    def visit(part: Any) -> Any:
        if isinstance(part, Tensor):
            if part.ndim == 0:
                return part
            if part.shape[0] != size:
                raise ValueError(
                    f"a tensor of shape {tuple(part.shape)} stands in a batch of {size} examples; expected {size} as"
                    " its first dimension (or no dimension, for a value that all examples share): change the collate_fn"
                )
            return on_tensor(part)
        if isinstance(part, _SHARED_LEAVES):
            return part
        if isinstance(part, Mapping):
            mapped = {key: visit(value) for key, value in part.items()}
            if not isinstance(part, MutableMapping):
                return mapped
            rebuilt = copy.copy(part)  # keeps the type: BatchEncoding, OrderedDict, ...
            rebuilt.update(mapped)
            return rebuilt
        if isinstance(part, (list, tuple)):
            if len(part) == size and all(isinstance(item, _SHARED_LEAVES) for item in part):
                return on_list(part)
            items = [visit(item) for item in part]
            return type(part)(*items) if hasattr(part, "_fields") else type(part)(items)
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return dataclasses.replace(
                part,
                **{field.name: visit(getattr(part, field.name)) for field in dataclasses.fields(part) if field.init},
            )
        raise TypeError(
            f"cannot take examples out of a {type(part).__name__} in the batch; expected tensors, lists of strings or"
            " numbers, and mappings, tuples or dataclasses of them"
        )

    return visit(batch)


def slice_batch(batch: Any, size: int, start: int, stop: int) -> Any:
    """Examples ``start`` to ``stop`` of a batch of ``size``, in the batch's own structure."""
    if start == 0 and stop >= size:
        return batch
    return map_batch(batch, size, lambda tensor: tensor[start:stop], lambda items: items[start:stop])


def fresh_batch(batch: Any, size: int) -> Any:
    """The batch with inference tensors cloned, since autograd cannot save those; call it outside inference mode."""
    return map_batch(
        batch, size, lambda tensor: tensor.clone() if tensor.is_inference() else tensor, lambda items: items
    )


def infer_batch_size(batch: Any) -> int:
    """Number of examples of a batch: the first dimension of its first tensor.

    Raises:
        ValueError: if the batch holds no tensor with a dimension.
    """
    found: list[int] = []

    def visit(part: Any) -> None:
        if isinstance(part, Tensor) and part.ndim > 0:
            found.append(part.shape[0])
        elif isinstance(part, Mapping):
            for value in part.values():
                visit(value)
        elif isinstance(part, (list, tuple)):
            for item in part:
                visit(item)
        elif dataclasses.is_dataclass(part) and not isinstance(part, type):
            for field in dataclasses.fields(part):
                visit(getattr(part, field.name))

    visit(batch)
    if not found:
        raise ValueError(f"cannot tell how many examples a {type(batch).__name__} without tensors holds")
    return found[0]
