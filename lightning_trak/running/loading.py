"""Loading chosen examples of a dataset as the user's loader would load them."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_trak.running.loaders import DEFAULT_BATCH_SIZE


def batch_size_of(loader: DataLoader[Any]) -> int:
    """The loader's batch size, or 32 when a batch sampler of varying sizes decides."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else DEFAULT_BATCH_SIZE


class _Batches(Sampler[list[int]]):
    """Lists of positions, made as they are asked for."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.batches)


def like(loader: DataLoader[Any], dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """A loader of another dataset, or in another order, that collates and works as the given one does.

    Args:
        loader: the loader to be like.
        dataset: what is loaded.
        options: of the new DataLoader: which batches, and what differs.
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
    """A loader like the given one that yields exactly these batches of dataset positions."""
    return like(
        loader,
        loader.dataset,
        batch_sampler=_Batches(batches),
        num_workers=loader.num_workers if num_workers is None else num_workers,
        collate_fn=collate_fn or loader.collate_fn,
        generator=torch.Generator(),  # the workers' base seed must not come from the user's random state
    )


def sample_batches(loader: DataLoader[Any], count: int, key: str) -> list[list[int]]:
    """Positions of a uniform sample of a loader's dataset, without replacement, in batches of the loader's size.

    Args:
        loader: whose dataset.
        count: how many; all, in another order, if there are no more.
        key: what the sample depends on.
    """
    total = len(cast(Any, loader.dataset))
    sample = random.Random(key).sample(range(total), min(count, total))
    size = batch_size_of(loader)
    return [sample[start : start + size] for start in range(0, len(sample), size)]
