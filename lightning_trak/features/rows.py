"""Features and their scalars, as they are computed and as they are stored. Each example has a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.features.dtypes import FeatureDtype

_BLOCK_BYTES = 1 << 24  # of decoded features: memory allocators keep and reuse blocks of this size


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
        step = max(1, _BLOCK_BYTES // (self.k * max(4, self.dtype.floating.itemsize)))
        for start in range(0, len(self.codes), step):
            yield self[start : start + step].decode()

    def decode_columns(self, columns: range) -> Tensor:
        """Some columns of the features, in ``dtype.floating``. The first one is even, since two can share a byte."""
        stored = slice(self.dtype.columns(columns.start), self.dtype.columns(columns.stop))
        return self.dtype.decode(self.codes[:, stored], self.scales, len(columns))

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
        tensors: the columns by name, as :attr:`StoredFeatures.tensors`.
        count: expected number of rows.
        dtype: how features are stored.
        k: expected number of features per example; None for any.
    """
    quantized = dtype.quantizer is not None
    names = {*Features._fields, "scales"} if quantized else set(Features._fields)
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
        if name != "features" and (column.shape != (count,) or not column.is_floating_point()):
            return f"its {name} are {column.dtype} of shape {tuple(column.shape)}, not numbers of shape ({count},)"
    if quantized and not bool((tensors["scales"].isfinite() & (tensors["scales"] >= 0)).all()):
        return "its scales are not all finite and at least 0"
    return None
