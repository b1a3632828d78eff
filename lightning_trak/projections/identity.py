"""No projection at all: the features are the gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from lightning_trak.projections.base import BoundProjection, Projection


@dataclass(frozen=True)
class IdentityProjection(Projection):
    """Concatenate the gradients of all parameters, in the order in which they are bound.

    The features are exact. Use it for small models only: the number of features k is the number of elements of all
    selected parameters, and a Gram matrix has k x k entries.
    """

    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundProjection:
        """Give each parameter its place in the features, see :meth:`Projection.bind`. Nothing is random."""
        return BoundIdentityProjection(shapes)


class BoundIdentityProjection(BoundProjection):
    """The identity: each parameter has its place in the features."""

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__(shapes, sum(map(math.prod, shapes.values())))
        self._offsets = dict(zip(self.sizes, accumulate(self.sizes.values(), initial=0), strict=False))

    def _add(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        features.narrow(1, self._offsets[name] + start, gradients.shape[1]).add_(gradients)
