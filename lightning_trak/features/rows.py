"""Features and their scalars, as they are computed and as they are stored. Each example has a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.features.dtypes import FeatureDtype

_BLOCK_BYTES = 1 << 24  # of decoded features: memory allocators keep and reuse blocks of this size
_CACHED_BYTES = 1 << 21  # the same, where each block is used at once and may stay in cache


class Features(NamedTuple):
    """The rows of a shard or of a batch.

    Attributes:
        features: projected gradients phi, shape ``(n, k)``.
        outputs: model outputs f, shape ``(n,)``.
        loss_gradients: Q = -dl/df, shape ``(n,)``.
        curvatures: R = d2l/df2, shape ``(n,)``.
    """

    features: Tensor
    outputs: Tensor
    loss_gradients: Tensor
    curvatures: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        """The rows of all parts, one after another."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True, eq=False)
class StoredFeatures:
    """The rows of a shard, with features as they are stored: floats, or integer codes and a scale for each row.

    Attributes:
        codes: the stored features, shape ``(n, dtype.columns(k))``.
        scales: of the codes, shape ``(n,)``; None if floats are stored.
        outputs: as in :class:`Features`, like the next two.
        loss_gradients: Q = -dl/df.
        curvatures: R = d2l/df2.
        dtype: how features are stored.
        k: number of features per example.
    """

    codes: Tensor
    scales: Tensor | None
    outputs: Tensor
    loss_gradients: Tensor
    curvatures: Tensor
    dtype: FeatureDtype
    k: int

    @classmethod
    def encode(cls, rows: Features, dtype: FeatureDtype) -> StoredFeatures:
        """Round features to what is stored."""
        return cls(*dtype.encode(rows.features), *rows[1:], dtype, rows.features.shape[1])

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], dtype: FeatureDtype, k: int) -> StoredFeatures:
        """The rows with these columns, see :meth:`tensors`."""
        columns = {name: tensors[name] for name in Features._fields[1:]}
        return cls(tensors["features"], tensors.get("scales"), **columns, dtype=dtype, k=k)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The columns by name."""
        scales = {} if self.scales is None else {"scales": self.scales}
        return {"features": self.codes, **self._scalars, **scales}

    @property
    def _scalars(self) -> dict[str, Tensor]:
        """Outputs, loss gradients and curvatures, by name."""
        return {name: getattr(self, name) for name in Features._fields[1:]}

    def decode(self) -> Features:
        """The rows with features in ``dtype.floating``."""
        return Features(self.dtype.decode(self.codes, self.scales, self.k), **self._scalars)

    def blocks(self) -> Iterator[Features]:
        """The same rows a few at a time, so that only a little is decoded at any time."""
        for some in self._slices(_BLOCK_BYTES):
            yield self[some].decode()

    def _slices(self, size: int) -> Iterator[slice]:
        """Slices of the rows, so that the decoded features of each take this many bytes at most, if not one row."""
        step = max(1, size // (self.k * max(4, self.dtype.floating.itemsize)))
        for start in range(0, len(self.codes), step):
            yield slice(start, start + step)

    def __getitem__(self, rows: slice | Tensor) -> StoredFeatures:
        """Some of the rows: a slice, or a bool mask of shape ``(n,)``."""
        return self._each(lambda column: column[rows])

    def moved(self, move: Callable[[Tensor], Tensor]) -> StoredFeatures:
        """The rows after ``move``, such as a copy to a device, of the codes and scales. The scalars stay."""
        return replace(self, codes=move(self.codes), scales=None if self.scales is None else move(self.scales))

    def on_host(self) -> StoredFeatures:
        """The rows on the CPU."""
        return self._each(Tensor.cpu)

    def _each(self, change: Callable[[Tensor], Tensor]) -> StoredFeatures:
        """The rows after a change of all columns."""
        scalars: dict[str, Any] = {name: change(column) for name, column in self._scalars.items()}
        return replace(self.moved(change), **scalars)

    def rounding(self, rows: Features) -> Rounding | None:
        """What rounding has changed in features that were given to :meth:`encode`; None if floats are stored."""
        if self.dtype.quantizer is None:
            return None
        kept, lost = torch.zeros(2, self.k, dtype=torch.float64, device=self.codes.device)
        for some in self._slices(_CACHED_BYTES if self.codes.is_cpu else _BLOCK_BYTES):
            given, stored = rows.features[some], self[some].decode().features
            # Divided by the largest element, so that squares are in range.
            largest = given.abs().amax(1, keepdim=True)
            units = torch.where(largest > 0, largest, 1)
            norms = (given / units).norm(dim=1, keepdim=True)
            units = units * torch.where(largest > 0, norms, 1)
            stored.div_(units)
            kept += stored.square().sum(0)
            lost += stored.sub_(given / units).square_().sum(0)
        return Rounding(kept.float().cpu(), lost.float().cpu())


class Rounding(NamedTuple):
    """What rounding to integers has changed in some rows, column by column. Each row counts relative to its norm.

    Attributes:
        kept: sums of squares of what is stored, shape ``(k,)``.
        lost: sums of squares of the differences from what was given, shape ``(k,)``.
    """

    kept: Tensor
    lost: Tensor


class RoundedFeatures(NamedTuple):
    """Rows as they are stored.

    Attributes:
        stored: the rows.
        rounding: what rounding has changed; None if floats are stored.
    """

    stored: StoredFeatures
    rounding: Rounding | None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The columns by name, and what rounding has changed."""
        return self.stored.tensors | ({} if self.rounding is None else {"rounding": torch.stack(self.rounding)})


def without(rows: Features, left_out: Tensor) -> Features:
    """The same rows, with zeros in some of them.

    Args:
        rows: the rows.
        left_out: which rows, bool, shape ``(n,)``.
    """
    return Features(
        *(column.masked_fill(left_out.view(-1, *[1] * (column.ndim - 1)).to(column.device), 0) for column in rows)
    )


def in_order(parts: list[tuple[Tensor, Features]], examples: range) -> Features:
    """Put rows that came in parts, each with its positions, in the order of the examples.

    Raises:
        RuntimeError: if some are missing.
    """
    missing = len(examples) - sum(len(positions) for positions, _ in parts)
    if missing:
        raise RuntimeError(f"the features of {missing} targets are missing; look for an error of another rank")
    order = torch.cat([positions for positions, _ in parts]).argsort()
    return Features(*(column[order] for column in Features.cat([rows for _, rows in parts])))


def misfit(tensors: dict[str, Tensor], count: int, dtype: FeatureDtype, k: int | None) -> str | None:
    """Describe what is wrong with the rows of a shard; None if nothing is wrong.

    Args:
        tensors: the columns by name, as :attr:`RoundedFeatures.tensors`.
        count: expected number of rows.
        dtype: how features are stored.
        k: expected number of features per example; None for any.
    """
    quantized = dtype.quantizer is not None
    names = {*Features._fields, "scales", "rounding"} if quantized else set(Features._fields)
    if set(tensors) != names:
        return f"it holds {', '.join(sorted(tensors))}, not {', '.join(sorted(names))}"
    features = tensors["features"]
    if features.ndim != 2 or not features.shape[1]:
        return f"its features have shape {tuple(features.shape)}, not (examples, k)"
    if len(features) != count:
        return f"it holds {len(features)} examples, not {count}"
    if features.dtype != dtype.codes:
        found, wanted = (str(each).removeprefix("torch.") for each in (features.dtype, dtype.codes))
        return f"its features are {found}, not {wanted}"
    if k is not None and features.shape[1] != dtype.columns(k):
        what = "bytes" if quantized else "features"
        return f"it has {features.shape[1]} {what} per example, but other shards have {dtype.columns(k)}"
    for name, column in tensors.items():
        if name not in ("features", "rounding") and (column.shape != (count,) or not column.is_floating_point()):
            return f"its {name} are {column.dtype} of shape {tuple(column.shape)}, not numbers of shape ({count},)"
    if quantized and not bool((tensors["scales"].isfinite() & (tensors["scales"] >= 0)).all()):
        return "its scales are not all finite and at least 0"
    if quantized and tensors["rounding"].shape != (2, k):
        return f"its rounding has shape {tuple(tensors['rounding'].shape)}, not (2, {k})"
    if quantized and not bool((tensors["rounding"].isfinite() & (tensors["rounding"] >= 0)).all()):
        return "its rounding is not all finite and at least 0"
    return None
