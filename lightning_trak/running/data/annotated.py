"""Numbers beside a user's batch, such as labels that the model has predicted, or which token of a text a row is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_trak.running.data.loaders import like
from lightning_trak.running.data.loading import batch_size_of, num_examples


class AnnotatedBatch(NamedTuple):
    """A batch of the user's loader, and numbers for each of its rows.

    Attributes:
        batch: as the user's code makes it. The user's transfer hooks see nothing else.
        notes: int64, shape ``(batch, columns)``.
    """

    batch: Any
    notes: Tensor


def annotated(loader: DataLoader[Any], notes: Tensor, examples: Tensor | None = None) -> DataLoader[Any]:
    """A loader whose batches are :class:`AnnotatedBatch`, as many rows at a time as in the given one.

    Args:
        loader: the loader.
        notes: of each row, int64, shape ``(rows, columns)``.
        examples: the position of each row's example in the loader's dataset; default: one row for each, in order.
    """
    positions = torch.arange(len(notes)) if examples is None else examples
    collate: Callable[[list[Any]], Any] = loader.collate_fn
    return like(
        loader,
        _Annotated(loader.dataset, positions, notes),
        batch_size=batch_size_of(loader),
        collate_fn=partial(_collate, collate),
    )


def numbered(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader whose batches are :class:`AnnotatedBatch`, with the positions of their examples as notes."""
    return annotated(loader, torch.arange(num_examples(loader)).unsqueeze(1))


class _Annotated(Dataset[Any]):
    """Pairs of items and notes. Other attributes are those of the dataset, which a ``worker_init_fn`` may use."""

    def __init__(self, dataset: Any, positions: Tensor, notes: Tensor) -> None:
        self._dataset, self._positions, self._notes = dataset, positions.tolist(), notes

    def __len__(self) -> int:
        return len(self._notes)

    def __getitem__(self, row: int) -> tuple[Any, Tensor]:
        return self._dataset[self._positions[row]], self._notes[row]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for these before there is a dataset
            raise AttributeError(name)
        return getattr(self._dataset, name)


def _collate(collate: Callable[[list[Any]], Any], rows: Sequence[tuple[Any, Tensor]]) -> AnnotatedBatch:
    return AnnotatedBatch(collate([item for item, _ in rows]), torch.stack([notes for _, notes in rows]))
