"""The numbers that a store keeps: floats, or integers of few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_trak.projections.quantization import Int4, Int8, Quantized, Quantizer
from lightning_trak.projections.rotation import rotated

DtypeName = Literal["float64", "float32", "bfloat16", "float16", "int8", "int4"]
Dtype = DtypeName | torch.dtype

NAMES: tuple[DtypeName, ...] = get_args(DtypeName)
_QUANTIZERS: dict[str, Quantizer] = {"int8": Int8(), "int4": Int4()}
_BYTES = 8192  # of the features of an example by default


@dataclass(frozen=True)
class FeatureDtype:
    """How a feature is stored.

    Attributes:
        name: its name, such as ``"int8"``.
    """

    name: DtypeName

    @property
    def quantizer(self) -> Quantizer | None:
        """What rounds rows to integers; None if floats are stored."""
        return _QUANTIZERS.get(self.name)

    @property
    def floating(self) -> torch.dtype:
        """The dtype of features before they are stored, and after they are read. Features of targets keep it."""
        found: torch.dtype = torch.float32 if self.quantizer else getattr(torch, self.name)
        return found

    @property
    def codes(self) -> torch.dtype:
        """The dtype of what is stored."""
        return self.quantizer.codes_dtype if self.quantizer else self.floating

    def columns(self, k: int) -> int:
        """The number of elements that store a row of k features."""
        return self.quantizer.columns(k) if self.quantizer else k

    def prepared(self, features: Tensor) -> Tensor:
        """Features as they are given to :meth:`encode`: rotated before they become integers, which need that.

        Args:
            features: in float32 or float64, shape ``(n, k)``.
        """
        return rotated(features) if self.quantizer else features

    @property
    def error(self) -> float:
        """The norm of what rounding to integers changes in a row of features, relative to the row's; 0 for floats."""
        return self.quantizer.error if self.quantizer else 0.0

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """What is stored of features: the codes, and a scale for each row if there is a quantizer.

        Args:
            features: from :meth:`prepared`, finite numbers in :attr:`floating`, shape ``(n, k)``.
        """
        return self.quantizer.quantize(features) if self.quantizer else (features, None)

    def decode(self, codes: Tensor, scales: Tensor | None, k: int) -> Tensor:
        """The features ``(n, k)`` that were given to :meth:`encode`, up to rounding."""
        if self.quantizer is None:
            return codes
        assert scales is not None
        return self.quantizer.dequantize(Quantized(codes, scales), k)

    def rounding(self, features: Tensor) -> float:
        """The norm of what :meth:`encode` changes in features; 0 without a quantizer, or if they are not finite."""
        if self.quantizer is None or not features.isfinite().all():
            return 0.0
        stored = self.decode(*self.encode(features), features.shape[1])
        return float((stored.double() - features.double()).norm())


def default_dtype(k: int) -> FeatureDtype:
    """How k features are stored by default: as float32 or int8 if they take at most 8 KiB then, otherwise as int4.

    At 8 KiB an example, many features of few bits lose less than fewer of more bits: docs/faithfulness.md.
    """
    return FeatureDtype("float32" if 4 * k <= _BYTES else "int8" if k <= _BYTES else "int4")


def feature_dtype(dtype: Dtype | FeatureDtype) -> FeatureDtype:
    """Find out how features are stored.

    Args:
        dtype: a name, a float dtype of torch with such a name, or the result of this function.

    Raises:
        ValueError: if features cannot be stored like that.
    """
    if isinstance(dtype, FeatureDtype):
        return dtype
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.") if dtype.is_floating_point else None
    else:
        name = dtype
    if name not in NAMES:
        raise ValueError(
            f"dtype must be one of {', '.join(map(repr, NAMES))}, or a float dtype of torch; got {dtype!r}"
        )
    return FeatureDtype(name)
