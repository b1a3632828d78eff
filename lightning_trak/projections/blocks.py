"""Random projections that are generated in blocks of rows. The whole matrix is never in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from lightning_trak.projections.base import BoundProjection, Projection
from lightning_trak.projections.philox import Stream

# Random values in a block. It is a constant, so that sums are always split at the same rows, with any cache size.
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class RandomProjection(Projection):
    """Base class of random projections. A subclass defines what a block of rows is; its bound half applies blocks.

    Args:
        dim: number of features k.
        cache_bytes: bytes of blocks to keep between batches. The other blocks are generated again for each batch.
            Features do not depend on this number.

    Attributes:
        value_dtype: dtype of the random values in a block.
    """

    value_dtype: ClassVar[torch.dtype]

    dim: int = 2048
    cache_bytes: int = field(default=1 << 30, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        self._require_positive("dim")

    @property
    @abstractmethod
    def values_per_row(self) -> int:
        """Random values in a block for each of its rows."""

    @abstractmethod
    def block(self, stream: Stream, rows: range, device: torch.device) -> Tensor:
        """Generate the block for some rows of P_name.

        Args:
            stream: random numbers of the parameter.
            rows: indices of consecutive elements of the parameter.
            device: the device of the block.

        Returns:
            Random values for these rows, with the rows in the first dimension. A value depends only on the stream, the
            row and the column.
        """

    def streams(self, names: Iterable[str], seed: int, checkpoint: int, purpose: str = "") -> dict[str, Stream]:
        """The stream of random numbers for each parameter, and for a purpose if there are several."""
        kind = type(self).__qualname__ + purpose
        return {name: Stream.derive(kind, seed, checkpoint, name) for name in names}


class BoundRandomProjection(BoundProjection):
    """A :class:`RandomProjection` of one checkpoint's parameters. It keeps blocks between batches."""

    def __init__(
        self,
        config: RandomProjection,
        shapes: Mapping[str, Sequence[int]],
        streams: Mapping[str, Stream],
        device: torch.device,
    ) -> None:
        super().__init__(shapes, config.dim)
        self._lengths = dict(self.sizes)  # rows of P_name that are random blocks
        self._config = config
        self._streams = streams
        self._device = device
        self._cache: dict[tuple[str, int], Tensor] = {}
        self._cache_left = config.cache_bytes

    def _blocks(self, name: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """The blocks of some rows of P_name, in order, each with its first row."""
        step = max(1, _BLOCK_VALUES // self._config.values_per_row)
        for first in range(start // step * step, stop, step):
            begin, end = max(start, first), min(stop, first + step)
            yield (
                begin,
                self._rows(name, first, min(step, self._lengths[name] - first), slice(begin - first, end - first)),
            )

    def _rows(self, name: str, first: int, length: int, wanted: slice) -> Tensor:
        """Some rows of a block. The cache keeps a whole block or nothing of it."""
        block = self._cache.get((name, first))
        if block is not None:
            return block[wanted]
        # The first blocks are kept. Every batch asks for the blocks in the same order, so a cache that drops the least
        # recently used block would always drop the block that is needed next.
        kept = length * self._config.values_per_row * self._config.value_dtype.itemsize <= self._cache_left
        drawn = slice(0, length) if kept else wanted
        with torch.inference_mode(False):  # the cache may use the block outside the inference mode of this hook
            rows = range(first + drawn.start, first + drawn.stop)
            block = self._config.block(self._streams[name], rows, self._device)
        if not kept:
            return block
        self._cache_left -= block.nbytes
        self._cache[name, first] = block
        return block[wanted]
