"""Factored projections: each layer's gradient is compressed from both sides, so that it never has to be formed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.projections.base import BoundProjection, Projection, check_positive
from lightning_trak.projections.dense import RademacherProjection
from lightning_trak.projections.identity import IdentityProjection
from lightning_trak.projections.philox import Stream
from lightning_trak.projections.sparse import SparseProjection


@dataclass(frozen=True)
class KroneckerProjection(Projection):
    """Project each parameter's gradient G, as a matrix, to A^T G B with random signs A and B.

    A weight of shape (outputs, *inputs) is a matrix of as many rows as outputs; a vector is a matrix of one column. The
    gradient of a layer is a sum of products g a^T, of output gradients and inputs, so the `HookEngine` projects g and a
    and multiplies what is left, (A^T g) (B^T a)^T, and the gradient is not formed (Choe et al. 2024, arXiv 2405.13954,
    section 3.1). Other engines get the same features by multiplying the gradients.

    The inner product of two features has mean <x, y>, summed over parameters. Its variance is larger than that of a
    dense projection to as many features where gradients are close to rank one. A side that is not longer than its
    factor is wide is kept as it is.

    Args:
        left: Width of A: features of the outputs.
        right: Width of B: features of the inputs.
        dim: Number of features k to which those of all parameters, up to left * right each, are added up by a
            `SparseProjection`; None lays them side by side, which makes k grow with the number of layers.

    """

    left: int = 16
    right: int = 16
    dim: int | None = None

    def __post_init__(self) -> None:
        check_positive(left=self.left, right=self.right)
        if self.dim is not None:
            check_positive(dim=self.dim)

    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundKroneckerProjection:
        """Fix the projection for one checkpoint: see `Projection.bind`."""
        return BoundKroneckerProjection(self, shapes, seed, checkpoint, device)


class BoundKroneckerProjection(BoundProjection):
    """A `KroneckerProjection` of one checkpoint's parameters; made by its `bind`."""

    def __init__(
        self,
        config: KroneckerProjection,
        shapes: Mapping[str, Sequence[int]],
        seed: int,
        checkpoint: int,
        device: torch.device,
    ) -> None:
        self._matrices = {name: (shape[0] if shape else 1, math.prod(shape[1:])) for name, shape in shapes.items()}
        self._cores = {
            name: (min(rows, config.left), min(columns, config.right))
            for name, (rows, columns) in self._matrices.items()
        }
        together = IdentityProjection() if config.dim is None else SparseProjection(config.dim)
        self._together = together.bind(self._cores, seed, checkpoint, device)
        super().__init__(shapes, self._together.dim)
        self._seed, self._checkpoint, self._device = seed, checkpoint, device
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a parameter: float32 signs or identities, of shapes (rows, left) and (columns, right)."""
        if name not in self._factors:
            pairs = zip(("left", "right"), self._matrices[name], self._cores[name], strict=True)
            with torch.inference_mode(False):  # they outlive the inference mode of the hook that asks for them
                left, right = (self._factor(f"KroneckerProjection/{side}", name, *pair) for side, *pair in pairs)
            self._factors[name] = left, right
        return self._factors[name]

    def _factor(self, purpose: str, name: str, length: int, width: int) -> Tensor:
        if length == width:
            return torch.eye(width, device=self._device)
        stream = Stream.derive(purpose, self._seed, self._checkpoint, name)
        return RademacherProjection(width).block(stream, torch.arange(length, device=self._device))

    def add_core_(self, features: Tensor, name: str, cores: Tensor) -> None:
        """Add a parameter's projected gradients to `features` in place.

        Args:
            features: Features so far, float32 or float64 of shape (batch, dim).
            name: Name of the parameter.
            cores: A^T G B for each example, of shape (batch, left, right), with A and B from `factors`.

        """
        # Entries of variance 1 / width keep inner products; signs have variance 1.
        sides = zip(self._matrices[name], self._cores[name], strict=True)
        scale = math.prod(1 / math.sqrt(width) for length, width in sides if length != width)
        self._together.add_(features, name, cores.flatten(1) * scale)

    def _add(self, features: Tensor, name: str, gradients: Tensor) -> None:
        dtype = torch.promote_types(gradients.dtype, torch.float32)
        left, right = (factor.to(dtype) for factor in self.factors(name))
        matrices = gradients.to(dtype).view(len(gradients), *self._matrices[name])
        self.add_core_(features, name, left.T @ (matrices @ right))
