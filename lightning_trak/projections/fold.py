"""Folds of large matrices: sums of their slices, which products of factors give without the matrix itself."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_trak.projections.philox import Stream

_COLUMNS = 16  # the width of a slice is a multiple of this number, for which products of matrices are fast


class Fold:
    """Adds up the slices of a matrix, with random signs and random cyclic shifts.

    A slice is some consecutive columns of the matrix, all of one number s; the last slice is filled up with zeros. Row
    r and column c have random signs u_r and v_c. Slice f, times u_r v_c, is cyclically shifted by t_f rows and by w_f
    columns, and added to the sums, a matrix of as many rows and s columns. The shifts t_f are all different.

    A gradient that is a sum of outer products, A^T B, with output gradients A (positions x rows) and inputs B
    (positions x columns), need not be formed. The sums are one product of matrices themselves: each slice of B, times
    its signs and shifted by columns, is multiplied with A, times its signs and shifted by rows. It takes as many
    multiplications as A^T B, but fewer numbers are written and read again.

    All signs and shifts are independent and uniform. Two elements can have the same sum only if they are of different
    rows, columns and slices. Then the probability is ``1 / ((rows - 1) * s)``. The sign of a pair is u_r u_r' v_c v_c',
    which two pairs share only if one is (r, c) and (r', c'), and the other (r, c') and (r', c). Both have a sum in
    common only if r and r' are half of the rows apart. All other pairs are uncorrelated.

    Args:
        rows: rows of the matrix.
        columns: columns of the matrix.
        slices: number of slices, from 2 to ``rows``. There are fewer if their width is rounded up.
        row_stream: random numbers of rows: their signs, and the shifts t_f.
        column_stream: random numbers of columns: their signs, and the shifts w_f.
        device: where gradients are.

    Attributes:
        shape: rows and columns of the sums.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        slices: int,
        row_stream: Stream,
        column_stream: Stream,
        device: torch.device,
    ) -> None:
        width = -(-columns // (slices * _COLUMNS)) * _COLUMNS
        slices = -(-columns // width)
        self.shape = rows, width
        self._columns = columns
        # The order of random words is a random order, so its first elements are different.
        row_shifts = _words(row_stream, rows, device).argsort(stable=True)[:slices]
        # Multiply and shift: 32 uniform bits become a shift. Probabilities are even up to width / 2^32.
        column_shifts = _words(column_stream, slices, device) * width >> 32
        self._row_shifts: list[int] = row_shifts.tolist()
        self._column_shifts: list[int] = column_shifts.tolist()
        self._row_signs = row_stream.signs(range(rows), device)
        self._column_signs = column_stream.signs(range(columns), device)
        # The column of the matrix that each slice has at each place of the sums.
        starts = torch.arange(slices, device=device) * width
        places = (torch.arange(width, device=device).unsqueeze(1) - column_shifts).remainder_(width) + starts
        self._column_places = places.clamp(max=columns - 1).flatten()
        self._placed_signs = self._column_signs[self._column_places] * (places < columns).flatten()

    @property
    def size(self) -> int:
        """Number of sums."""
        return math.prod(self.shape)

    def numbers(self, positions: int) -> int:
        """How many numbers :meth:`of_factors` makes for each example with so many positions."""
        return self.size + (self.size if self._forms_slices(positions) else self._copied(positions))

    def _forms_slices(self, positions: int) -> bool:
        """Whether factors have so many positions that copies of them would not be much smaller than the matrix."""
        return 2 * self._copied(positions) > self.shape[0] * self._columns

    def _copied(self, positions: int) -> int:
        """How many numbers of the factors are copied if no slice is formed."""
        return positions * len(self._row_shifts) * sum(self.shape)

    def of_factors(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The sums of each example's matrix A^T B. If there are few positions, they are one product of matrices.

        Args:
            rows: A, shape ``(batch, positions, rows)``.
            columns: B, shape ``(batch, positions, columns)``.

        Returns:
            Shape ``(batch, rows, s)``.
        """
        (count, positions, height), width = rows.shape, self.shape[1]
        if self._forms_slices(positions):
            rows = rows * self._row_signs
            sums = rows.new_zeros(count, height, width, dtype=torch.promote_types(rows.dtype, torch.float32))
            for index, some in self._slices():
                self._add_slice(sums, rows.mT @ columns[..., some], index, 0)
            return sums
        row_signs, column_signs = self._row_signs.to(rows), self._column_signs.to(columns)
        copies = len(self._row_shifts) * positions
        left, right = rows.new_empty(count, copies, height), columns.new_empty(count, copies, width)
        right[:, -positions:].zero_()  # the last slice may be shorter
        for index, some in self._slices():
            part = slice(index * positions, (index + 1) * positions)
            _copy_shifted(rows, row_signs, self._row_shifts[index], left[:, part])
            _copy_shifted(columns[..., some], column_signs[some], self._column_shifts[index], right[:, part])
        return left.mT @ right

    def add_(self, sums: Tensor, matrices: Tensor, start: int = 0) -> None:
        """Add the sums of whole rows of each example's matrix, in place.

        Args:
            sums: sums so far, shape ``(batch, rows, s)``.
            matrices: some consecutive rows, shape ``(batch, n, columns)``.
            start: the first one of them.
        """
        signs = self._row_signs[start : start + matrices.shape[1]].unsqueeze(1)
        for index, some in self._slices():
            self._add_slice(sums, matrices[..., some].to(sums.dtype) * signs, index, start)

    def of_rows(self, rows: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of matrices of which few rows are not zero, as rows of the sums that may not be zero.

        Args:
            rows: some rows of each example's matrix, shape ``(batch, n, columns)``.
            numbers: the indices of these rows, shape ``(batch, n)``.

        Returns:
            Rows of the sums, shape ``(batch, m, s)``, and their indices, shape ``(batch, m)``. Rows with the same index
            are summed.
        """
        signed = rows * self._row_signs[numbers].unsqueeze(2)
        found = signed[..., self._column_places] * self._placed_signs
        shifts = torch.tensor(self._row_shifts, device=numbers.device)
        places = (numbers.unsqueeze(2) + shifts) % self.shape[0]
        return found.view(*rows.shape[:2], self.shape[1], -1).mT.flatten(1, 2), places.flatten(1)

    def _slices(self) -> Iterator[tuple[int, slice]]:
        """The number and the columns of each slice."""
        width = self.shape[1]
        return ((index, slice(index * width, (index + 1) * width)) for index in range(len(self._row_shifts)))

    def _add_slice(self, sums: Tensor, piece: Tensor, index: int, start: int) -> None:
        """Shift and add rows of a slice from ``start`` on, shape (batch, n, s or less), times the signs of rows."""
        height, width = self.shape
        signs = self._column_signs[index * width : (index + 1) * width].to(sums.dtype)
        for column, length, place in _shifted(0, piece.shape[2], self._column_shifts[index], width):
            columns = slice(column, column + length)
            for row, number, target in _shifted(start, start + piece.shape[1], self._row_shifts[index], height):
                part = piece[:, row - start : row - start + number, columns].to(sums.dtype)
                sums[:, target : target + number, place : place + length].addcmul_(part, signs[columns])


def _words(stream: Stream, count: int, device: torch.device) -> Tensor:
    """Random words that the signs of a stream do not use, int64 of shape (count,)."""
    return stream.words(torch.arange(count, device=device), 2)[:, 1, 0]


def _copy_shifted(matrices: Tensor, signs: Tensor, shift: int, to: Tensor) -> None:
    """Write the columns of matrices, times their signs and cyclically shifted, to the places of other matrices."""
    for start, number, place in _shifted(0, matrices.shape[2], shift, to.shape[2]):
        columns = slice(start, start + number)
        torch.mul(matrices[..., columns], signs[columns], out=to[..., place : place + number])


def _shifted(start: int, stop: int, shift: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Cut consecutive places where a cyclic shift ends: the first place, the number, where the first one goes."""
    cut = min(max(start, length - shift), stop)
    if start < cut:
        yield start, cut - start, start + shift
    if cut < stop:
        yield cut, stop - cut, cut + shift - length
