"""Labels that are given to the examples of a dataset, beside what its batches hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_trak.running.loading import batch_size_of, like


class LabelledBatch(NamedTuple):
    """A batch of the user's loader, and a label for each of its examples.

    Attributes:
        batch: as the user's code makes it. The user's transfer hooks see nothing else.
        labels: int64, shape ``(batch,)``.
    """

    batch: Any
    labels: Tensor


def with_labels(loader: DataLoader[Any], labels: Tensor) -> DataLoader[Any]:
    """A loader of the same examples, in order, whose batches are :class:`LabelledBatch`.

    Args:
        loader: the loader.
        labels: of all examples of its dataset, int64, shape ``(n,)``.
    """
    collate: Callable[[list[Any]], Any] = loader.collate_fn
    return like(
        loader,
        _Labelled(loader.dataset, labels),
        batch_size=batch_size_of(loader),
        collate_fn=partial(_collate, collate),
    )


class _Labelled(Dataset[Any]):
    """Pairs of items and labels. Other attributes are those of the dataset, which a ``worker_init_fn`` may use."""

    def __init__(self, dataset: Any, labels: Tensor) -> None:
        self._dataset, self._labels = dataset, labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self._dataset[index], self._labels[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for these before there is a dataset
            raise AttributeError(name)
        return getattr(self._dataset, name)


def _collate(collate: Callable[[list[Any]], Any], items: Sequence[tuple[Any, Tensor]]) -> LabelledBatch:
    return LabelledBatch(collate([item for item, _ in items]), torch.stack([label for _, label in items]))
