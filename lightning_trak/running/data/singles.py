"""Batches of one example each, for data whose batches cannot be taken apart again, such as graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import DataLoader

from lightning_trak.running.data.loaders import like
from lightning_trak.running.data.loading import batch_size_of


class Singles(list[Any]):
    """A batch for each example, as the user's collate function makes it of this example alone."""


def one_by_one(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of the same dataset whose batches are :class:`Singles`, as many examples at a time as before.

    Args:
        loader: the loader.
    """
    return like(
        loader, loader.dataset, batch_size=batch_size_of(loader), collate_fn=_CollatesOneByOne(loader.collate_fn)
    )


def is_one_by_one(loader: DataLoader[Any]) -> bool:
    """Whether a loader is from :func:`one_by_one`."""
    return isinstance(loader.collate_fn, _CollatesOneByOne)


def joined(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader that was given to :func:`one_by_one`, up to its sampler."""
    assert isinstance(loader.collate_fn, _CollatesOneByOne)
    return like(loader, loader.dataset, batch_size=batch_size_of(loader), collate_fn=loader.collate_fn.collate)


class _CollatesOneByOne:
    """A collate function that calls another one on each example alone."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> Singles:
        return Singles(self.collate([item]) for item in items)
