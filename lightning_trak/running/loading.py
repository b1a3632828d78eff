"""Loads chosen examples of a dataset in the way of the user's loader."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_trak.running.loaders import DEFAULT_BATCH_SIZE


def batch_size_of(loader: DataLoader[Any]) -> int:
    """The loader's batch size, or 32 if its batch sampler has no fixed size."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else DEFAULT_BATCH_SIZE


class _Batches(Sampler[list[int]]):
    """Yields lists of positions, each made when it is needed."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.batches)


def like(loader: DataLoader[Any], dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """A new loader with the collate function, workers and other settings of a given one.

    Args:
        loader: the loader whose settings are copied.
        dataset: the dataset of the new loader.
        options: further arguments of the new DataLoader: its batches, and settings that differ.
    """
    same = {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    return DataLoader(dataset, **(same | options))


def load(
    loader: DataLoader[Any],
    batches: Iterable[Sequence[int]],
    num_workers: int | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """A loader with the settings of the given one that yields exactly these batches of dataset positions."""
    return like(
        loader,
        loader.dataset,
        batch_sampler=_Batches(batches),
        num_workers=loader.num_workers if num_workers is None else num_workers,
        collate_fn=collate_fn or loader.collate_fn,
        generator=torch.Generator(),  # the workers' base seed must not come from the user's random state
    )


def sample_batches(loader: DataLoader[Any], count: int, key: str, total: int | None = None) -> list[list[int]]:
    """Positions of a uniform sample of a loader's dataset, without replacement, in batches of the loader's size.

    Args:
        loader: the loader.
        count: the size of the sample. If there are no more items, all are taken, in a random order.
        key: the seed of the sample.
        total: how many of the first items to draw from; None: all.
    """
    total = len(cast(Any, loader.dataset)) if total is None else total
    sample = random.Random(key).sample(range(total), min(count, total))
    size = batch_size_of(loader)
    return [sample[start : start + size] for start in range(0, len(sample), size)]
