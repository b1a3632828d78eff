"""The sparse Johnson-Lindenstrauss transform (SJLT), whose cost does not grow with the number of features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.projections.blocks import BoundRandomProjection, RandomProjection
from lightning_trak.projections.philox import Stream

# Elements whose targets a CPU draws or widens at a time: what it makes on the way should stay in cache, and below the
# size from which the allocator returns memory to the system after each use.
_CPU_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class SparseProjection(RandomProjection):
    """Add each gradient element to `nonzeros` random features, with random signs.

    Dasgupta, Kumar and Sarlos (2010); Kane and Nelson (2014), of whose two constructions this is the one by blocks: the
    features form `nonzeros` equal blocks, and an element goes to one feature of each. Its targets are thus distinct and
    every row of P has length one. `nonzeros=1` is the count sketch (Charikar, Chen and Farach-Colton 2002), which GraSS
    (Hu et al. 2025) found as good for attribution as dense projections. The inner product of two features has mean
    <x, y> and variance ``(|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / dim`` for any `nonzeros`; more of them only
    thin the tails for gradients with a few dominant elements, at proportional cost.

    On a CPU, features are the same bit for bit for any number of threads. On CUDA, atomic additions round in the order
    in which they land; `torch.use_deterministic_algorithms(True)` or `Trainer(deterministic=True)` fixes it.

    Args:
        dim: Number of features k, a multiple of `nonzeros`.
        nonzeros: Features that each gradient element is added to.
        cache_bytes: Bytes of targets (2 for each element and nonzero, 4 where `dim` is above 32,768) to keep between
            batches; the others are generated again for each batch.

    """

    nonzeros: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("nonzeros")
        if self.dim % self.nonzeros:
            raise ValueError(f"Expected `dim` to be a multiple of `nonzeros`={self.nonzeros} but got dim={self.dim}.")

    @property
    def values_per_row(self) -> int:
        """Random values that a block holds for each of its rows: `nonzeros`."""
        return self.nonzeros

    @property
    def bytes_per_row(self) -> int:
        """Bytes that a block takes for each of its rows."""
        return self.nonzeros * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        """The smallest type that holds targets: a CPU widens them faster than it reads wide ones."""
        return torch.uint16 if 2 * self.dim <= 1 << 16 else torch.int32

    def block(self, stream: Stream, rows: Tensor) -> Tensor:
        """Draw the targets: feature of each element, plus `dim` where its sign is negative; (rows, nonzeros)."""
        parts = torch.split(rows, _CPU_ELEMENTS) if rows.device.type == "cpu" else (rows,)
        return torch.cat([self._targets(stream, part).to(self._dtype) for part in parts], dim=1).t()

    def _targets(self, stream: Stream, rows: Tensor) -> Tensor:
        words = stream.words(rows, math.ceil(self.nonzeros / 2)).view(len(rows), -1, 2)[:, : self.nonzeros]
        position, sign = words.unbind(-1)
        width = self.dim // self.nonzeros
        offset = torch.arange(0, self.dim, width, dtype=torch.int64, device=rows.device)
        # Multiply-shift maps 32 uniform bits to the features of a block evenly, to within width / 2^32.
        return ((position * width >> 32) + offset + (sign & 1) * self.dim).t()

    def apply_(self, features: Tensor, gradients: Tensor, block: Tensor) -> None:
        """Add the elements to their targets, in the wider of the two precisions.

        Positive and negative terms are summed apart and subtracted once: a product of gradients and signs would be one
        more pass over the largest tensor there is, longer than the additions themselves once that leaves the caches.
        """
        step = _CPU_ELEMENTS if gradients.device.type == "cpu" else gradients.shape[1]
        parts = zip(torch.split(block, step), torch.split(gradients, step, 1), strict=True)
        terms = ((targets, part) for narrow, part in parts for targets in narrow.t())
        self.scatter_(features, terms, torch.promote_types(gradients.dtype, features.dtype))

    def scatter_(self, features: Tensor, terms: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        """Add up targets, (rows,) or (batch, rows), and the elements that go there, (batch, rows), in some dtype."""
        sums = features.new_zeros(len(features), 2 * self.dim, dtype=dtype)
        for targets, part in terms:
            sums.scatter_add_(1, targets.to(torch.int64).expand_as(part), part.to(dtype))
        positive, negative = sums.chunk(2, dim=1)
        features.add_(positive.sub_(negative), alpha=1 / math.sqrt(self.nonzeros))

    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundSparseProjection:
        """Fix the projection for one checkpoint: see `Projection.bind`."""
        return BoundSparseProjection(self, shapes, self.streams(shapes, seed, checkpoint), device)


class BoundSparseProjection(BoundRandomProjection):
    """A `SparseProjection` of one checkpoint's parameters; made by its `bind`."""

    _config: SparseProjection

    def add_sparse_(self, features: Tensor, name: str, rows: Tensor, numbers: Tensor) -> None:
        """Add the product of P_name and gradients of which few rows are not zero; their targets are always drawn.

        Args:
            features: Features so far, float32 or float64 of shape (batch, dim).
            name: Name of the parameter.
            rows: Some rows of each example's gradient, of shape (batch, n, columns).
            numbers: Which rows they are, int64 of shape (batch, n). Those that occur several times are summed.

        """
        batch, _, columns = rows.shape
        elements = numbers.unsqueeze(-1) * columns + torch.arange(columns, device=rows.device)
        targets = self._config.block(self._streams[name], elements.flatten())
        terms = ((each.view(batch, -1), rows.reshape(batch, -1)) for each in targets.t())
        self._config.scatter_(features, terms, torch.promote_types(rows.dtype, features.dtype))
