"""The sparse Johnson-Lindenstrauss transform (SJLT). Its cost does not grow with the number of features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.projections.base import BoundProjection
from lightning_trak.projections.blocks import BoundRandomProjection, RandomProjection
from lightning_trak.projections.fold import Fold
from lightning_trak.projections.identity import BoundIdentityProjection
from lightning_trak.projections.philox import SIGNS, Stream

# Sums are at least this many, so that a block of elements is long enough for one vectorised addition.
_SUMS = 1 << 13
# A matrix is folded to at least this many sums for each feature.
_FOLDED = 16
# Up to this many blocks of elements are added to the features at once. For more, sums of twice the length save runs.
_FEW = 24


@dataclass(frozen=True)
class SparseProjection(RandomProjection):
    """Add each gradient element to one random feature, with a random sign.

    With one feature for each element, the method is the count sketch (Charikar, Chen and Farach-Colton 2002), feature
    hashing (Weinberger et al. 2009, arXiv 0902.2206), or the SJLT of Kane and Nelson (2014) with one nonzero a column.
    GraSS (Hu et al. 2025) found it as good for attribution as dense projections.

    Here consecutive elements go to consecutive features, so that a projection reads and writes memory in order. The
    elements of a convolution's kernels, and of other parameters of three or more dimensions, are numbered with their
    second dimension last, since gradients are computed faster in this order.

    - A parameter has W sums; W is the smallest multiple of ``dim`` that is not below 8192. Its elements are cut into
      blocks of W. Block b is added to the sums in order, cyclically shifted by a random offset. Each element has a
      random sign.
    - The W sums are cut into W / ``dim`` parts of ``dim``. Each part is cyclically shifted by a random offset, and the
      parts are added up. If ``dim`` is 8192 or more, there is one part, and this step changes nothing.

    All offsets and signs are independent and uniform. The inner product of two features is the sum over all pairs of
    elements i, j with the same feature of s_i s_j x_i y_j. Signs of different elements cancel on average, so its mean
    is <x, y>. Its variance is the sum over pairs i < j of ``(x_i y_j + x_j y_i)^2 p_ij``, since the products s_i s_j of
    different pairs are uncorrelated. p_ij is the probability that both have the same feature. It is at most 1 / dim:

    - Two elements of different blocks or parameters: they have the same sum with probability 1 / W, and sums in
      different parts with probability 1 - dim / W. Then they have the same feature with probability 1 / dim. Together,
      this is 1 / W + (1 - dim / W) / dim = 1 / dim.
    - Two elements of one block never have the same sum. So p_ij is (1 / dim) times the probability that their sums are
      in different parts. With one part it is 0.

    So the variance is at most ``(|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / dim``, its value if every element had
    a feature of its own choice. A parameter of at most ``dim`` elements has no collisions within itself if ``dim`` is
    8192 or more.

    A matrix of at least 32 max(``dim``, 8192) elements is first folded (:class:`Fold`), to at least 16 sums for each
    feature, which take the place of its elements. Layers with few positions give them without forming the gradient. Two
    elements have the same sum of a fold of n rows of s sums with probability 1 / ((n - 1) s) at most, which is added to
    their p_ij. The mean p_ij is still about 1 / dim, since sums that are in one block never have the same feature.

    Models of at most ``dim`` parameters need no sums: their features are the gradients, and k is the number of their
    parameters.

    On a CPU, features have the same bits with any number of threads. On CUDA, the order of atomic additions changes
    their rounding. ``torch.use_deterministic_algorithms(True)`` or ``Trainer(deterministic=True)`` fixes the order.

    Args:
        dim: largest number of features k.
        cache_bytes: bytes of signs to keep between batches. The others are generated again for each batch. A sign takes
            one byte for each element.
    """

    value_dtype = torch.int8

    dim: int = 16384

    @property
    def values_per_row(self) -> int:
        """Random values in a block for each of its rows: a sign."""
        return 1

    def block(self, stream: Stream, rows: range, device: torch.device) -> Tensor:
        """Draw the signs of some elements, int8 of shape (rows,)."""
        return stream.signs(rows, device)

    def signs_of_runs(self, stream: Stream, starts: Tensor, length: int) -> Tensor:
        """Draw the signs of runs of consecutive elements.

        Args:
            stream: random numbers of the parameter.
            starts: the first element of each run, int64 of shape (runs,).
            length: number of elements of a run.

        Returns:
            int8 of shape (runs, length).
        """
        counters = (starts // SIGNS).unsqueeze(1) + torch.arange(-(-length // SIGNS) + 1, device=starts.device)
        words = stream.words(counters.flatten(), 1).view(len(starts), -1)
        places = (starts % SIGNS).unsqueeze(1) + torch.arange(length, device=starts.device)
        return 1 - 2 * (words.gather(1, places // 32) >> places % 32 & 1).to(torch.int8)

    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundProjection:
        """Fix the projection for one checkpoint, see :meth:`Projection.bind`."""
        if sum(map(math.prod, shapes.values())) <= self.dim:
            return BoundIdentityProjection(shapes)
        folds = self._folds(shapes, seed, checkpoint, device)
        return BoundSparseProjection(self, shapes, self.streams(shapes, seed, checkpoint), folds, device)

    def _folds(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> dict[str, Fold]:
        """The folds of large matrices."""
        slices = {name: self._slices(shape[0], math.prod(shape[1:])) for name, shape in shapes.items() if shape}
        large = {name: number for name, number in slices.items() if number > 1}
        rows, columns = (self.streams(large, seed, checkpoint, side) for side in ("/rows", "/columns"))
        with torch.inference_mode(False):  # they are used outside the inference mode of this pass, too
            return {
                name: Fold(shapes[name][0], math.prod(shapes[name][1:]), number, rows[name], columns[name], device)
                for name, number in large.items()
            }

    def _slices(self, rows: int, columns: int) -> int:
        """In how many slices a matrix is folded. With 16 positions, copies of factors and sums are then as large."""
        return min(rows, rows * columns // (_FOLDED * max(self.dim, _SUMS)), math.isqrt(columns) // 4)


class Placement:
    """The features that the elements of a parameter are added to.

    Args:
        stream: random numbers of the parameter. The first word of block 1 of row b is the offset of block b; the second
            one of row j is the offset of part j of the sums.
        size: number of elements.
        width: number of features.
        device: where gradients are.

    Attributes:
        sums: number of sums W.
        offsets: the offset of each block, in Python.
        small: whether there is one block at most.
    """

    def __init__(self, stream: Stream, size: int, width: int, device: torch.device) -> None:
        self._width = width
        parts = math.ceil(_SUMS / width)
        self.sums = parts * width
        blocks = math.ceil(size / self.sums)
        words = stream.words(torch.arange(max(blocks, parts), device=device), 2)[:, 1]
        # Multiply and shift: 32 uniform bits become an offset. Probabilities are even up to W / 2^32.
        self._offsets = words[:blocks, 0] * self.sums >> 32
        self.offsets: list[int] = self._offsets.tolist()
        self._features: Tensor | None = None  # of each sum; None: its own number
        if parts > 1:
            sums = torch.arange(self.sums, device=device)
            self._features = (sums + (words[:parts, 1] * width >> 32).repeat_interleave(width)) % width
        self.small = blocks <= 1
        self._all = self(torch.arange(size, device=device)) if self.small else None

    def __call__(self, elements: Tensor) -> Tensor:
        """The features of some elements, int64 of any shape."""
        sums = (elements + self._offsets[elements // self.sums]) % self.sums
        return sums if self._features is None else self._features[sums]

    def between(self, start: int, stop: int) -> Tensor:
        """The features of consecutive elements, as in calling this object."""
        if self._all is not None:
            return self._all[start:stop]
        return self(torch.arange(start, stop, device=self._offsets.device))

    @property
    def folds(self) -> bool:
        """Whether there are more sums than features."""
        return self._features is not None

    def runs(self, start: int, stop: int, width: int) -> list[tuple[int, int]]:
        """Consecutive elements in runs that go to consecutive sums: the first sum and the length of each run.

        Args:
            start: the first element.
            stop: the element after the last one.
            width: W, or 2 W if sum j may be number j or W + j, so that a block is one run.
        """
        runs = []
        while start < stop:
            block, place = divmod(start, self.sums)
            first = (place + self.offsets[block]) % width
            length = min(self.sums - place, width - first, stop - start)
            runs.append((first, length))
            start += length
        return runs

    def fold(self, sums: Tensor) -> Tensor:
        """Add sums up to features, of shapes (batch, W) and (batch, width)."""
        if self._features is None:
            return sums
        folded = sums.new_zeros(len(sums), self._width)
        _scatter(folded, self._features, sums)
        return folded


class _Run(NamedTuple):
    """Consecutive elements that go to consecutive sums: the first sum, their number and their signs."""

    first: int
    length: int
    signs: Tensor


class BoundSparseProjection(BoundRandomProjection):
    """A :class:`SparseProjection` of one checkpoint's parameters, made by its ``bind``.

    Attributes:
        folds: the folds of large matrices, by the name of the parameter.
    """

    _config: SparseProjection

    def __init__(
        self,
        config: SparseProjection,
        shapes: Mapping[str, Sequence[int]],
        streams: Mapping[str, Stream],
        folds: Mapping[str, Fold],
        device: torch.device,
    ) -> None:
        super().__init__(config, shapes, streams, device)
        self.folds = folds
        self._lengths.update({name: fold.size for name, fold in folds.items()})
        self._kernels = {name: shape[1] for name, shape in shapes.items() if len(shape) > 2}
        self._placements: dict[str, Placement] = {}
        self._last_runs: tuple[object, list[_Run]] | None = None

    def flattened(self, name: str, gradients: Tensor) -> Tensor:
        """Flatten gradients with their second dimension last, see :meth:`BoundProjection.flattened`."""
        channels = self._kernels.get(name)
        if channels is None:
            return super().flattened(name, gradients)
        rows = math.prod(gradients.shape[1:]) // self._row_sizes[name]
        return gradients.reshape(len(gradients), rows, channels, self._row_sizes[name] // channels).mT.flatten(1)

    def _add(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        fold = self.folds.get(name)
        if fold is None:
            self._add_elements(features, name, gradients, start)
            return
        columns = self._row_sizes[name]
        dtype = torch.promote_types(gradients.dtype, features.dtype)
        sums = gradients.new_zeros(len(gradients), *fold.shape, dtype=dtype)
        fold.add_(sums, gradients.reshape(len(gradients), -1, columns), start // columns)
        self.add_folded_(features, name, sums)

    def add_folded_(self, features: Tensor, name: str, sums: Tensor) -> None:
        """Add the gradients of a matrix that has a fold, from their sums.

        Args:
            features: features so far, float32 or float64 of shape (batch, dim).
            name: name of the parameter.
            sums: the sums that its fold gives, of shape (batch, rows, columns).
        """
        self._add_elements(features, name, sums.flatten(1), 0)

    def _add_elements(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        """Add elements of a gradient, or sums of its fold, from ``start`` on."""
        placement = self._placement(name)
        dtype = torch.promote_types(gradients.dtype, features.dtype)
        stop = start + gradients.shape[1]
        if gradients.device.type == "cpu" and not (placement.small and placement.folds):
            width = placement.sums
            wide = placement.folds or gradients.shape[1] > _FEW * width
            sums = gradients.new_zeros(len(gradients), 2 * width, dtype=dtype) if wide else features
            self._add_blocks(sums, placement, name, gradients, start)
            if wide:
                features += placement.fold(sums[:, :width].add_(sums[:, width:]))
            return
        for begin, block in self._blocks(name, start, stop):
            part = gradients[:, begin - start : begin - start + len(block)].to(dtype) * block
            _scatter(features, placement.between(begin, begin + len(block)), part)

    def _add_blocks(self, sums: Tensor, placement: Placement, name: str, gradients: Tensor, start: int) -> None:
        """Add elements from ``start`` on to the sums, of shape (batch, W) or (batch, 2 W), in place."""
        for begin, block in self._blocks(name, start, start + gradients.shape[1]):
            first, last = begin - start, begin - start + len(block)
            runs = self._runs(placement, name, begin, block, sums)
            parts = torch.split(gradients[:, first:last].to(sums.dtype), [run.length for run in runs], 1)
            for run, part in zip(runs, parts, strict=True):
                sums.narrow(1, run.first, run.length).addcmul_(part, run.signs)

    def _runs(self, placement: Placement, name: str, begin: int, block: Tensor, sums: Tensor) -> list[_Run]:
        """The runs of a block of elements. The last ones are kept: the next examples often need the same ones."""
        width = sums.shape[1]
        key = name, begin, len(block), width, sums.dtype
        if self._last_runs is None or self._last_runs[0] != key:
            places = placement.runs(begin, begin + len(block), width)
            with torch.inference_mode(False):  # they are used outside the inference mode of this hook, too
                drawn = torch.split(block.to(sums.dtype), [length for _, length in places])
            self._last_runs = key, [_Run(*place, some) for place, some in zip(places, drawn, strict=True)]
        return self._last_runs[1]

    def add_sparse_(self, features: Tensor, name: str, rows: Tensor, numbers: Tensor) -> None:
        """Add the product of P_name and gradients that have few rows that are not zero. Their signs are not cached.

        Args:
            features: features so far, float32 or float64 of shape (batch, dim).
            name: name of the parameter.
            rows: some rows of each example's gradient, of shape (batch, n, columns).
            numbers: the indices of these rows, int64 of shape (batch, n). Rows with the same index are summed.
        """
        placement = self._placement(name)
        if name in self.folds:
            rows, numbers = self.folds[name].of_rows(rows, numbers)
        columns = rows.shape[2]
        starts = numbers * columns
        drawn = self._config.signs_of_runs(self._streams[name], starts.flatten(), columns).view_as(rows)
        targets = placement(starts.unsqueeze(-1) + torch.arange(columns, device=rows.device))
        part = rows.to(torch.promote_types(rows.dtype, features.dtype)) * drawn
        _scatter(features, targets.flatten(1), part.flatten(1))

    def add_joined_(self, features: Tensor, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Add the gradients of several small parameters by one operation.

        Args:
            features: features so far, float32 or float64 of shape (batch, dim).
            names: names of the parameters, which have no folds.
            gradients: the :meth:`flattened` gradients of these parameters.
        """
        targets = torch.cat([self._placement(name).between(0, self.sizes[name]) for name in names])
        drawn = torch.cat([block for name in names for _, block in self._blocks(name, 0, self.sizes[name])])
        joined = torch.cat([*gradients], 1)
        _scatter(features, targets, joined.to(torch.promote_types(joined.dtype, features.dtype)) * drawn)

    def _placement(self, name: str) -> Placement:
        if name not in self._placements:
            with torch.inference_mode(False):  # it is used outside the inference mode of this hook, too
                self._placements[name] = Placement(self._streams[name], self._lengths[name], self.dim, self._device)
        return self._placements[name]


def _scatter(sums: Tensor, targets: Tensor, terms: Tensor) -> None:
    """Add terms, (batch, n), to sums, (batch, width), at their targets, (n,) or (batch, n)."""
    sums.scatter_add_(1, targets.expand_as(terms), terms.to(sums.dtype))
