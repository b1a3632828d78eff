"""Dense random projections. Their entries are independent, with mean 0 and variance 1 / dim."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.projections.blocks import BoundRandomProjection, RandomProjection
from lightning_trak.projections.philox import Stream, signs


@dataclass(frozen=True)
class DenseProjection(RandomProjection):
    """Base class of dense projections. A block is a matrix of entries with variance 1, float32 of shape (rows, dim).

    An entry depends only on its stream, row and column. With a larger ``dim``, the first columns stay the same.
    """

    value_dtype = torch.float32

    @property
    def values_per_row(self) -> int:
        """Random values in a block for each of its rows: ``dim``."""
        return self.dim

    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundDenseProjection:
        """Fix the projection for one checkpoint, see :meth:`Projection.bind`."""
        return BoundDenseProjection(self, shapes, self.streams(shapes, seed, checkpoint), device)


class BoundDenseProjection(BoundRandomProjection):
    """A :class:`DenseProjection` of one checkpoint's parameters, made by its ``bind``."""

    def _add(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        """Multiply by the blocks and by 1 / sqrt(dim), in the precision of the gradients, in float32 at least."""
        dtype = torch.promote_types(gradients.dtype, torch.float32)
        for begin, block in self._blocks(name, start, start + gradients.shape[1]):
            part = gradients[:, begin - start : begin - start + len(block)]
            features.add_(part.to(dtype) @ block.to(dtype), alpha=1 / math.sqrt(self.dim))


@dataclass(frozen=True)
class GaussianProjection(DenseProjection):
    """Normal entries N(0, 1 / dim), the projection of the TRAK paper (Park et al. 2023).

    The inner product of two features has mean <x, y> and variance ``(|x|^2 |y|^2 + <x, y>^2) / dim``. This projection
    is the slowest to generate. If the matrix does not fit into ``cache_bytes``, use :class:`RademacherProjection` or
    :class:`~lightning_trak.projections.SparseProjection`. The normal numbers are computed in float64, so the device
    must support float64. Between devices, they differ at most by float32 rounding.

    Args:
        dim: number of features k.
        cache_bytes: bytes of the matrix to keep between batches. The rest is generated again for each batch.
    """

    def block(self, stream: Stream, rows: range, device: torch.device) -> Tensor:
        """Generate rows by the transform of Box and Muller (1958). Column j uses block j div 4 of the stream."""
        words = stream.words(torch.arange(rows.start, rows.stop, device=device), math.ceil(self.dim / 4))
        uniform = words[..., :2].double().add_(0.5).mul_(2**-32)  # 0 < uniform < 1, so the logarithm is finite
        radius = uniform.log_().mul_(-2).sqrt_()
        angle = words[..., 2:].double().mul_(2 * math.pi * 2**-32)
        normal = torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1)
        return normal.flatten(1)[:, : self.dim].to(torch.float32, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class RademacherProjection(DenseProjection):
    """Entries +-1 / sqrt(dim) with equal probability (Achlioptas 2003). Each entry takes one random bit.

    The inner product of two features has mean <x, y> and variance
    ``(|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / dim``.

    Args:
        dim: number of features k.
        cache_bytes: bytes of the matrix to keep between batches. The rest is generated again for each batch.
    """

    def block(self, stream: Stream, rows: range, device: torch.device) -> Tensor:
        """Generate rows. Column j uses bit j mod 128 of block j div 128 of the stream."""
        words = stream.words(torch.arange(rows.start, rows.stop, device=device), math.ceil(self.dim / 128))
        return signs(words.flatten(1), torch.float32)[:, : self.dim].contiguous()
