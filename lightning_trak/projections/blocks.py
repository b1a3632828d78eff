"""Random projections that are generated in blocks of rows, so that the matrix never has to exist as a whole."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_trak.projections.base import BoundProjection, Projection, check_positive
from lightning_trak.projections.philox import Stream

# Random values per block. A constant, so that sums are always split at the same rows, whatever is cached.
_BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class RandomProjection(Projection):
    """Base of the random projections, whose kinds differ in what a block of rows is and in how it is applied.

    Args:
        dim: Number of features k.
        cache_bytes: Bytes of blocks to keep between batches; the others are generated again for each batch. Features do
            not depend on it.

    """

    dim: int = 2048
    cache_bytes: int = field(default=1 << 30, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(dim=self.dim)

    @property
    @abstractmethod
    def values_per_row(self) -> int:
        """Random values that a block holds for each of its rows."""

    @abstractmethod
    def block(self, stream: Stream, rows: Tensor) -> Tensor:
        """Make the block of some rows of P_name.

        Args:
            stream: Stream of the parameter.
            rows: Indices of the parameter's elements, int64 of shape (rows,).

        Returns:
            What `apply_` needs of these rows, whose values depend on the stream, the row and the column alone.

        """

    @abstractmethod
    def apply_(self, features: Tensor, gradients: Tensor, block: Tensor) -> None:
        """Add the product of gradients (batch, rows) and a block's rows of P_name to features (batch, dim) in place."""

    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundProjection:
        """Fix the projection for one checkpoint: see `Projection.bind`."""
        kind = type(self).__qualname__
        streams = {name: Stream.derive(kind, seed, checkpoint, name) for name in shapes}
        return _BoundRandomProjection(self, shapes, streams, device)


class _BoundRandomProjection(BoundProjection):
    def __init__(
        self,
        config: RandomProjection,
        shapes: Mapping[str, Sequence[int]],
        streams: Mapping[str, Stream],
        device: torch.device,
    ) -> None:
        super().__init__(shapes, config.dim)
        self._config = config
        self._streams = streams
        self._device = device
        self._cache: dict[tuple[str, int], Tensor] = {}
        self._cache_left = config.cache_bytes

    def _add(self, features: Tensor, name: str, gradients: Tensor) -> None:
        step = max(1, _BLOCK_VALUES // self._config.values_per_row)
        for start in range(0, self.sizes[name], step):
            part = gradients[:, start : start + step]
            self._config.apply_(features, part, self._block(name, start, part.shape[1]))

    def _block(self, name: str, start: int, length: int) -> Tensor:
        block = self._cache.get((name, start))
        if block is None:
            with torch.inference_mode(False):  # the block may outlive the inference mode of the hook that asks for it
                rows = torch.arange(start, start + length, dtype=torch.int64, device=self._device)
                block = self._config.block(self._streams[name], rows)
            # First come, first kept: every batch asks for the blocks in the same order, where discarding the least
            # recently used one would always discard the next one needed.
            if block.nbytes <= self._cache_left:
                self._cache_left -= block.nbytes
                self._cache[name, start] = block
        return block
