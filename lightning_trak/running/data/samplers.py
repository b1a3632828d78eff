"""Refuses loaders that draw a subset of their dataset."""

import copy
import operator
from collections.abc import Iterable, Iterator
from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_trak.running.random_states import isolated_random_states

# A custom sampler is iterated until it has drawn every position, or no new position in this many iterations, or in this
# many draws per example. A sampler that draws with replacement has drawn all examples by then.
_PATIENCE = 20


def require_whole(loader: DataLoader[Any]) -> None:
    """Check that a loader draws from all positions of its dataset. Order, batches and repetitions do not matter.

    The positions of torch's own samplers are known. For any other sampler a copy is iterated, and the random state is
    restored, so that the user's sampler is not affected.

    Raises:
        ValueError: if the loader draws only some positions, or positions that do not exist.
    """
    total = len(cast(Any, loader.dataset))
    batches: Any = loader.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    name = type(sampler).__name__
    size, count = _reach(sampler, total, loader.dataset)
    if size > total:
        raise ValueError(
            f"the loader's {name} draws from {size} positions, but its dataset has {total} examples: the sampler was"
            " made for another dataset; use DataLoader(dataset, batch_size=...)"
        )
    if count < total:
        raise ValueError(
            f"the loader draws a subset with {name} ({count} of {total} examples), but scores are indexed by position"
            " in its dataset; use DataLoader(torch.utils.data.Subset(dataset, indices)), or, for all examples, the"
            " loader without its sampler"
        )


def _reach(sampler: Any, total: int, dataset: Any) -> tuple[int, int]:
    """The highest position that a sampler draws plus one, and the number of the ``total`` positions that it draws."""
    kind = type(sampler)
    if kind in (SequentialSampler, RandomSampler):
        size = len(sampler.data_source)
    elif isinstance(sampler, DistributedSampler):  # it draws only this rank's share
        size = len(cast(Any, sampler.dataset))
    elif kind is WeightedRandomSampler:
        return len(sampler.weights), int((sampler.weights > 0).sum())
    else:
        return _try(sampler, total, dataset)
    return size, min(size, total)


def _try(sampler: Any, total: int, dataset: Any) -> tuple[int, int]:
    try:
        copied = copy.deepcopy(sampler, {id(dataset): dataset})
    except Exception as error:  # whatever the user's objects raise
        raise ValueError(
            f"cannot check whether the loader draws a subset: its {type(sampler).__name__} cannot be copied"
            f" ({type(error).__name__}: {error}); use DataLoader(dataset, batch_size=...) without this sampler"
        ) from error
    seen, size, idle = bytearray(total), 0, 0
    count = iterations = 0
    with isolated_random_states():
        while count < total and iterations < _PATIENCE and idle < _PATIENCE * total:
            iterations += 1
            for position in _positions(copied):
                size = max(size, position + 1)
                if 0 <= position < total and not seen[position]:
                    seen[position] = 1
                    count, idle, iterations = count + 1, 0, 0
                idle += 1
                if count == total or idle >= _PATIENCE * total:
                    break
    return size, count


def _positions(sampler: Iterable[Any]) -> Iterator[int]:
    key: Any = None
    try:
        for drawn in sampler:
            many = isinstance(drawn, (list, tuple)) or (isinstance(drawn, (Tensor, np.ndarray)) and drawn.ndim > 0)
            for key in drawn if many else (drawn,):
                yield operator.index(key)
    except TypeError as error:
        raise ValueError(
            f"the loader's {type(sampler).__name__} draws {key!r}, which is not a position in the dataset, but scores"
            " are indexed by position; use a dataset with items 0, 1, ... and a loader without a custom sampler"
        ) from error
