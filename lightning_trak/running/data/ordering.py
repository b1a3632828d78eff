"""Checks that batches hold their examples in the order in which they were asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.compatibility import tree_iter
from lightning_trak.running.data.content import spread
from lightning_trak.running.data.loading import batch_size_of, load, num_examples
from lightning_trak.running.random_states import isolated_random_states

_MOST = 8  # examples that are compared


def require_order(loader: DataLoader[Any], what: str) -> None:
    """Check that the collate function of a loader keeps the order of the examples.

    A batch is compared with its examples alone. A part of the batch that holds the same rows in another order shows a
    change of the order. Rows that the collate function changes, such as by padding, show nothing.

    Args:
        loader: the loader.
        what: the loader's data, in errors.

    Raises:
        ValueError: if the order changes.
    """
    total = num_examples(loader)
    count = min(_MOST, batch_size_of(loader), total)
    if count < 2:
        return
    positions = spread(total, count)
    with isolated_random_states():
        singles = ([position] for position in positions)
        batch, *alone = map(_tensors, load(loader, [positions, *singles], one_worker=True))
    for number, whole in enumerate(batch):
        rows = [tensors[number] for tensors in alone if len(tensors) == len(batch)]
        if len(rows) == len(positions) and _permuted(whole, rows):
            raise ValueError(
                f"the collate function of {what} changes the order of the examples of a batch, so it is not known which"
                " example a row belongs to: keep the order (of packed sequences, by enforce_sorted=False)"
            )


def _tensors(batch: Any) -> list[Tensor]:
    return [part for part in tree_iter(batch) if isinstance(part, Tensor)]


def _permuted(whole: Tensor, rows: Sequence[Tensor]) -> bool:
    """Whether a tensor holds the same rows in another order."""
    if whole.ndim == 0 or len(whole) != len(rows) or any(row.shape != (1, *whole.shape[1:]) for row in rows):
        return False
    expected = torch.cat(list(rows))
    if torch.equal(expected, whole):
        return False
    same = (expected.reshape(len(rows), 1, -1) == whole.reshape(1, len(rows), -1)).all(2)
    return bool(same.any(0).all() and same.any(1).all())
