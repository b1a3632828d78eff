"""Positions in a ``StreamingDataset`` of litdata.

It is an iterable dataset, whose order depends on shuffling, workers and ranks. But it also gives the item at a position
of the optimized data, and attribution uses that.
"""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

from torch.utils.data import Dataset
from typing_extensions import override


def is_streaming(data: object) -> bool:
    """Whether data are a ``StreamingDataset`` of litdata, which the user has imported."""
    litdata = sys.modules.get("litdata")
    return litdata is not None and isinstance(data, litdata.StreamingDataset)


class StreamingItems(Dataset[Any]):
    """The items of a ``StreamingDataset``, in the order of the optimized data: chunk after chunk, without shuffling.

    A subsample counts from 0 to its own size. The user's dataset is not changed. Each process opens the chunks anew,
    because workers must not share open files.

    Args:
        dataset: the dataset. Its ``shuffle`` and ``drop_last``, and the rank that it belongs to, do not matter.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._opened: Any = None
        self._process = 0
        opened = _closed_copy(dataset)
        opened.get_len(1, 1)  # the share of this rank, but it also reads the index of all chunks
        chunks = opened.shuffler.cache.get_chunk_intervals()
        # Fewer than all in a subsample.
        self._length: int = sum(chunk.roi_end_idx - chunk.roi_start_idx for chunk in chunks)

    def __len__(self) -> int:
        return self._length

    @override
    def __getitem__(self, index: int) -> Any:
        if self._process != os.getpid():
            self._opened, self._process = _closed_copy(self._dataset), os.getpid()
            self._opened[:0]  # from a slice on, litdata fetches whole chunks, not the bytes of one item after the other
        return self._opened[index]

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for workers that are spawned."""
        return vars(self) | {"_opened": None, "_process": 0}


def _closed_copy(dataset: Any) -> Any:
    copied = copy.copy(dataset)
    copied.cache = copied.shuffler = None
    return copied
