"""The sparse Johnson-Lindenstrauss transform (SJLT), whose cost does not grow with the number of features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.projections.base import check_positive
from lightning_trak.projections.blocks import RandomProjection
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
        check_positive(nonzeros=self.nonzeros)
        if self.dim % self.nonzeros:
            raise ValueError(f"Expected `dim` to be a multiple of `nonzeros`={self.nonzeros} but got dim={self.dim}.")

    @property
    def values_per_row(self) -> int:
        """Random values that a block holds for each of its rows: `nonzeros`."""
        return self.nonzeros

    def block(self, stream: Stream, rows: Tensor) -> Tensor:
        """Draw the targets: feature of each element, plus `dim` where its sign is negative; (nonzeros, rows).

        They are kept in the smallest type that holds them: a CPU widens them faster than it reads wide ones.
        """
        dtype = torch.uint16 if 2 * self.dim <= 1 << 16 else torch.int32
        parts = torch.split(rows, _CPU_ELEMENTS) if rows.device.type == "cpu" else (rows,)
        return torch.cat([self._targets(stream, part).to(dtype) for part in parts], dim=1)

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
        source = gradients.to(torch.promote_types(gradients.dtype, features.dtype))
        sums = source.new_zeros(len(features), 2 * self.dim)
        step = _CPU_ELEMENTS if source.device.type == "cpu" else source.shape[1]
        for narrow, part in zip(torch.split(block, step, 1), torch.split(source, step, 1), strict=True):
            for targets in narrow:
                sums.scatter_add_(1, targets.to(torch.int64).expand_as(part), part)
        positive, negative = sums.chunk(2, dim=1)
        features.add_(positive.sub_(negative), alpha=1 / math.sqrt(self.nonzeros))
