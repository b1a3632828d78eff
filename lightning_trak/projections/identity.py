"""No projection at all: the features are the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightning_trak.projections.base import BoundProjection, Projection


@dataclass(frozen=True)
class IdentityProjection(Projection):
    """Concatenate the gradients of all parameters, in the order in which they are bound.

    Exact, for models small enough: a feature is as large as the selected parameters together, and a Gram matrix has the
    square of that.
    """

    def bind(self, sizes: Mapping[str, int], seed: int, checkpoint: int, device: torch.device) -> BoundProjection:  # noqa: ARG002
        """Lay the parameters out side by side: see `Projection.bind`. Nothing is random."""
        return _BoundIdentityProjection(sizes, sum(sizes.values()))


class _BoundIdentityProjection(BoundProjection):
    def __init__(self, sizes: Mapping[str, int], dim: int) -> None:
        super().__init__(sizes, dim)
        self._offsets = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))

    def _add(self, features: Tensor, name: str, gradients: Tensor) -> None:
        features.narrow(1, self._offsets[name], self.sizes[name]).add_(gradients)
