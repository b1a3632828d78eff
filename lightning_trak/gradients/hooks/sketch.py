"""Sketches: a few numbers from each parameter's gradient, which are enough to compare two gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_trak.projections.base import BoundProjection

_WIDTH = 256  # numbers in the sketch of a parameter's gradient
_ROWS = 1 << 12  # summed at a time


class Sketches(BoundProjection):
    """Random sums of the elements of each parameter's gradient, side by side in the order of the parameters.

    A gradient is split into rows of equal length, and the rows are added up with random signs. This is a count sketch
    (Charikar, Chen and Farach-Colton 2002); its hash is the position in the row. The squared length is kept on average,
    so the sketches of two gradients differ about as much as the gradients. A sketch takes one pass over the gradient,
    and little memory.

    Args:
        shapes: shape of each parameter, by name.
        device: where gradients are.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], device: torch.device) -> None:
        super().__init__(shapes, _WIDTH * len(shapes))
        rows = -(-max(self.sizes.values()) // _WIDTH)
        signs = torch.randint(2, (rows,), generator=torch.Generator().manual_seed(0))
        self._signs = (2 * signs - 1).to(device, torch.float32)
        self._columns = {name: slice(i * _WIDTH, (i + 1) * _WIDTH) for i, name in enumerate(self.sizes)}

    def of(self, features: Tensor, name: str) -> Tensor:
        """The sketches of one parameter's gradients, of shape (batch, 256)."""
        return features[:, self._columns[name]]

    def _add(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        sketches, signs = self.of(features, name), self._signs.to(torch.promote_types(gradients.dtype, torch.float32))
        before = start % _WIDTH
        if before:
            gradients = F.pad(gradients, (before, 0))
        for offset in range(0, gradients.shape[1], _ROWS * _WIDTH):
            part = gradients[:, offset : offset + _ROWS * _WIDTH].to(signs)
            whole = part.shape[1] // _WIDTH * _WIDTH
            rows = part[:, :whole].reshape(len(part), -1, _WIDTH)
            first = (start - before + offset) // _WIDTH
            sketches += signs[first : first + rows.shape[1]] @ rows
            if whole < part.shape[1]:
                sketches[:, : part.shape[1] - whole] += signs[first + rows.shape[1]] * part[:, whole:]
