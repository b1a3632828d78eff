"""No projection, and gradients in a shorter exact form where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_trak.projections.identity import BoundIdentityProjection, IdentityProjection

_SAMPLE = 32  # examples whose shapes decide the forms


@dataclass(frozen=True)
class GradientFactors(IdentityProjection):
    """Keep each parameter's gradient exactly: as it is, or as the two factors that it is a product of.

    What is stored is shorter than the gradient, and not a vector of features: inner products need the forms, see
    :mod:`lightning_trak.gradients.hooks.factors`. The forms are found by a few training examples.
    """

    @property
    @override
    def sample_size(self) -> int:
        return _SAMPLE

    @override
    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundGradientFactors:
        return BoundGradientFactors(shapes)


class BoundGradientFactors(BoundIdentityProjection):
    """The identity on whole gradients, with the forms in which they are stored.

    Attributes:
        fitted: the forms as tensors; empty until :meth:`set_fit`.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__(shapes)
        self.fitted: Mapping[str, Tensor] = {}

    @override
    def set_fit(self, fitted: Mapping[str, Tensor]) -> None:
        self.fitted = fitted
