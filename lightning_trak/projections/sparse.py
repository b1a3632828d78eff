"""The sparse Johnson-Lindenstrauss transform (SJLT). Its cost does not grow with the number of features."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.projections.blocks import BoundRandomProjection, RandomProjection
from lightning_trak.projections.philox import Stream

# Elements whose targets a CPU draws or converts at a time. The temporary tensors should stay in cache. They should also
# stay below the size from which the allocator returns memory to the system after each use.
_CPU_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class SparseProjection(RandomProjection):
    """Add each gradient element to ``nonzeros`` random features, with random signs.

    The method is by Dasgupta, Kumar and Sarlos (2010) and by Kane and Nelson (2014). This is the block construction of
    the latter: the features form ``nonzeros`` equal blocks, and an element goes to one feature of each block. So the
    targets of an element are distinct, and every row of P has length one. ``nonzeros=1`` is the count sketch
    (Charikar, Chen and Farach-Colton 2002). GraSS (Hu et al. 2025) found it as good for attribution as dense
    projections. For any ``nonzeros``, the inner product of two features has mean <x, y> and variance
    ``(|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / dim``. A larger ``nonzeros`` makes large errors rarer for
    gradients with a few dominant elements. The cost grows in proportion.

    On a CPU, features have the same bits with any number of threads. On CUDA, the order of atomic additions changes
    their rounding. ``torch.use_deterministic_algorithms(True)`` or ``Trainer(deterministic=True)`` fixes the order.

    Args:
        dim: number of features k, a multiple of ``nonzeros``.
        nonzeros: number of features that each gradient element is added to.
        cache_bytes: bytes of targets to keep between batches. The others are generated again for each batch. A target
            takes 2 bytes for each element and nonzero, or 4 if ``dim`` is above 32,768.
    """

    nonzeros: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_positive("nonzeros")
        if self.dim % self.nonzeros:
            raise ValueError(f"Expected `dim` to be a multiple of `nonzeros`={self.nonzeros} but got dim={self.dim}.")

    @property
    def values_per_row(self) -> int:
        """Random values in a block for each of its rows: ``nonzeros``."""
        return self.nonzeros

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a block for each of its rows."""
        return self.nonzeros * self._dtype.itemsize

    @property
    def _dtype(self) -> torch.dtype:
        """The smallest type that holds targets. A CPU converts small targets faster than it reads large ones."""
        return torch.uint16 if 2 * self.dim <= 1 << 16 else torch.int32

    def block(self, stream: Stream, rows: Tensor) -> Tensor:
        """Draw targets, shape (rows, nonzeros): the feature of each element, plus ``dim`` if its sign is negative."""
        parts = torch.split(rows, _CPU_ELEMENTS) if rows.device.type == "cpu" else (rows,)
        return torch.cat([self._targets(stream, part).to(self._dtype) for part in parts], dim=1).t()

    def _targets(self, stream: Stream, rows: Tensor) -> Tensor:
        words = stream.words(rows, math.ceil(self.nonzeros / 2)).view(len(rows), -1, 2)[:, : self.nonzeros]
        position, sign = words.unbind(-1)
        width = self.dim // self.nonzeros
        offset = torch.arange(0, self.dim, width, dtype=torch.int64, device=rows.device)
        # Multiply and shift: 32 uniform bits become a feature of the block. Probabilities are even up to width / 2^32.
        return ((position * width >> 32) + offset + (sign & 1) * self.dim).t()

    def apply_(self, features: Tensor, gradients: Tensor, block: Tensor) -> None:
        """Add the elements to their targets, in the higher of the two precisions.

        Positive and negative terms have separate sums, which are subtracted once. Gradients times signs would be one
        more pass over the largest tensor. If this tensor does not fit in the caches, that pass is slower than the sums.
        """
        step = _CPU_ELEMENTS if gradients.device.type == "cpu" else gradients.shape[1]
        parts = zip(torch.split(block, step), torch.split(gradients, step, 1), strict=True)
        terms = ((targets, part) for narrow, part in parts for targets in narrow.t())
        self.scatter_(features, terms, torch.promote_types(gradients.dtype, features.dtype))

    def scatter_(self, features: Tensor, terms: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
        """Add elements to their targets in a dtype.

        Args:
            features: features so far, shape (batch, dim); changed in place.
            terms: pairs of targets, (rows,) or (batch, rows), and elements, (batch, rows).
            dtype: the dtype of the sums.
        """
        sums = features.new_zeros(len(features), 2 * self.dim, dtype=dtype)
        for targets, part in terms:
            sums.scatter_add_(1, targets.to(torch.int64).expand_as(part), part.to(dtype))
        positive, negative = sums.chunk(2, dim=1)
        features.add_(positive.sub_(negative), alpha=1 / math.sqrt(self.nonzeros))

    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundSparseProjection:
        """Fix the projection for one checkpoint, see :meth:`Projection.bind`."""
        return BoundSparseProjection(self, shapes, self.streams(shapes, seed, checkpoint), device)


class BoundSparseProjection(BoundRandomProjection):
    """A :class:`SparseProjection` of one checkpoint's parameters, made by its ``bind``."""

    _config: SparseProjection

    def add_sparse_(self, features: Tensor, name: str, rows: Tensor, numbers: Tensor) -> None:
        """Add the product of P_name and gradients that have few rows that are not zero. Their targets are not cached.

        Args:
            features: features so far, float32 or float64 of shape (batch, dim).
            name: name of the parameter.
            rows: some rows of each example's gradient, of shape (batch, n, columns).
            numbers: the indices of these rows, int64 of shape (batch, n). Rows with the same index are summed.
        """
        batch, _, columns = rows.shape
        elements = numbers.unsqueeze(-1) * columns + torch.arange(columns, device=rows.device)
        targets = self._config.block(self._streams[name], elements.flatten())
        terms = ((each.view(batch, -1), rows.reshape(batch, -1)) for each in targets.t())
        self._config.scatter_(features, terms, torch.promote_types(rows.dtype, features.dtype))
