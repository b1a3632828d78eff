"""Features in few bits: integer codes, with a scale for each row.

Every step works on elements or takes a maximum, and sums are folded in a fixed order. So a row has the same codes and
scale in every batch and on every device.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

_BYTES = 1 << 21  # of float32 rows that are worked on at a time, in cache
_DEVICE_BYTES = 1 << 25  # the same on a GPU, where many small operations take longer than one
_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = 2.0**-149  # the smallest float32 above zero

# What the 16 codes of 4 bits stand for, in 127ths of the outermost one: the levels of least mean square error for a
# normal density (Max 1960, "Quantizing for minimum distortion"). A test computes them again.
LEVELS = (-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127)
_OUTERMOST = 2.7326  # in standard deviations


class Quantized(NamedTuple):
    """Rows as integers.

    Attributes:
        codes: shape ``(n, columns)``.
        scales: float32, shape ``(n,)``.
    """

    codes: Tensor
    scales: Tensor


class Quantizer(ABC):
    """Turns rows of numbers into integer codes and scales, and back.

    The levels suit normal numbers, so rows should be rotated before (:mod:`lightning_trak.projections.rotation`).
    """

    bits: ClassVar[int]
    codes_dtype: ClassVar[torch.dtype]
    error: ClassVar[float]  # the norm of what rounding changes in a row of normal numbers, relative to the row's

    def columns(self, k: int) -> int:
        """The number of codes of a row of k numbers, each a byte."""
        return -(-k * self.bits // 8)

    def quantize(self, rows: Tensor) -> Quantized:
        """Round each row to the nearest codes.

        Args:
            rows: float32, shape ``(n, k)``.

        Raises:
            ValueError: if a number is not finite.
        """
        step = max(1, (_BYTES if rows.is_cpu else _DEVICE_BYTES) // (4 * max(1, rows.shape[1])))
        parts = []
        for part in torch.split(rows, step):
            numbers = part.float()
            largest = numbers.abs().amax(1)
            if not largest.isfinite().all():
                raise ValueError("only finite numbers can be quantized, got NaN or infinity")
            parts.append(self._quantize(numbers, largest))
        return Quantized(*(torch.cat(column) for column in zip(*parts, strict=True)))

    @abstractmethod
    def _quantize(self, rows: Tensor, largest: Tensor) -> Quantized:
        """Round rows whose largest absolute elements are finite."""

    @abstractmethod
    def dequantize(self, quantized: Quantized, k: int) -> Tensor:
        """The numbers that the codes stand for: float32, shape ``(n, k)``."""


class Int8(Quantizer):
    """Codes from -127 to 127 in units of a row's scale, which is its largest element / 127."""

    bits = 8
    codes_dtype = torch.int8
    error = 0.0095

    def _quantize(self, rows: Tensor, largest: Tensor) -> Quantized:
        # Rounded up, so that no element is clipped, and below the number whose multiples overflow.
        scales = (largest * (1 / 127)).nextafter(torch.full_like(largest, torch.inf)).clamp_(max=2.0**121)
        scales = torch.where(largest > 0, scales, 0.0)
        units = torch.where(largest > 0, scales, 1.0).unsqueeze(1)
        return Quantized((rows / units).round_().clamp_(-127, 127).to(torch.int8), scales)

    @override
    def dequantize(self, quantized: Quantized, k: int) -> Tensor:
        return quantized.codes.to(torch.float32).mul_(quantized.scales.unsqueeze(1))


class Int4(Quantizer):
    """Codes of 16 levels that lie closer near zero, see ``LEVELS``. Two codes share a byte, the first one its low half.

    The scale is what the outermost levels stand for, 2.7 times the row's root mean square.
    """

    bits = 4
    codes_dtype = torch.uint8
    error = 0.0975

    def _quantize(self, rows: Tensor, largest: Tensor) -> Quantized:
        largest = largest.unsqueeze(1)
        squares = _row_sums((rows / torch.where(largest > 0, largest, 1.0)).square())  # in range
        scales = largest * (squares / rows.shape[1]).sqrt() * _OUTERMOST
        # A level's share of a subnormal scale is rounded as any subnormal number, but the scale must not vanish.
        scales = torch.where(largest > 0, scales.clamp_(_SMALLEST, _LARGEST), 0.0)
        codes = _looked_up(_code_of_cell(rows.device), _cells(rows / torch.where(largest > 0, scales, 1.0)))
        if codes.shape[1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return Quantized(codes[:, ::2] | codes[:, 1::2] << 4, scales.squeeze(1))

    @override
    def dequantize(self, quantized: Quantized, k: int) -> Tensor:
        codes, scales = quantized
        pairs = _pair_of_byte(codes.device).index_select(0, codes.flatten().int())
        return pairs.view(torch.float32).view(len(codes), -1)[:, :k].mul_(scales.unsqueeze(1))


def _cells(shares: Tensor) -> Tensor:
    """The half-integer cell of each number, in 127ths: the nearest level is the same in the whole cell."""
    return (shares * 254).floor_().clamp_(-254, 253).add_(254).int()


def _looked_up(table: Tensor, cells: Tensor) -> Tensor:
    """``table[cells]``, in a third of the time on a CPU."""
    return table.index_select(0, cells.flatten()).view_as(cells)


def _row_sums(rows: Tensor) -> Tensor:
    """Sums over columns, shape ``(n, 1)``, in an order that depends on the number of columns alone."""
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        folded = rows[:, :half] + rows[:, half : 2 * half]
        rows = torch.cat([folded, rows[:, 2 * half :]], 1) if rows.shape[1] % 2 else folded
    return rows


@functools.cache
def _code_of_cell(device: torch.device) -> Tensor:
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    middles = (torch.arange(-254, 254, dtype=torch.float64) + 0.5) / 2
    return (middles.unsqueeze(1) - levels).abs().argmin(1).to(torch.uint8).to(device)


@functools.cache
def _level_of_code(device: torch.device) -> Tensor:
    return (torch.tensor(LEVELS, dtype=torch.float64) / 127).float().to(device)


@functools.cache
def _pair_of_byte(device: torch.device) -> Tensor:
    """Two float32 numbers for each byte, as one float64 number, since one look-up is faster than two."""
    byte, level = torch.arange(256, device=device), _level_of_code(device)
    return torch.stack([level[byte & 15], level[byte >> 4]], 1).view(torch.float64).flatten()
