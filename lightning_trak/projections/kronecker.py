"""Factored projections: each layer's gradient is compressed from both sides and is never formed itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lightning_trak.checks import require_one_of
from lightning_trak.projections.base import BoundProjection, Projection, SampleBatch
from lightning_trak.projections.dense import RademacherProjection
from lightning_trak.projections.identity import IdentityProjection
from lightning_trak.projections.philox import Stream
from lightning_trak.projections.principal import PrincipalAxes
from lightning_trak.projections.sparse import BoundSparseProjection, SparseProjection


@dataclass(frozen=True)
class KroneckerProjection(Projection):
    """Project each parameter's gradient G, as a matrix, to A^T G B. A and B hold random signs or principal axes.

    A weight of shape ``(outputs, *inputs)`` is a matrix with one row for each output. A vector is a matrix of one
    column. The gradient of a layer is a sum of products g a^T of output gradients g and inputs a. The ``HookEngine``
    projects g and a and then multiplies, (A^T g) (B^T a)^T, so it does not form the gradient (Choe et al. 2024,
    arXiv 2405.13954, section 3.1). Other engines form the gradients and multiply; the features are the same.

    With random signs, the inner product of two features has mean <x, y>, summed over parameters. If gradients are close
    to rank one, its variance is larger than that of a dense projection with as many features. If a side of G is not
    longer than the width of its factor, this side is not projected.

    Principal axes keep the directions in which gradients are largest. They are the leading eigenvectors of
    sum_i G_i G_i^T and of sum_i G_i^T G_i over a sample of the training set. They take one pass over the sample before
    everything else. The inner products are then biased, but each side loses as little as is possible with its number
    of axes. This is the truncated higher-order SVD of De Lathauwer et al. 2000. LogIX (arXiv 2405.13954, section 3.2)
    uses the axes of inputs and output gradients instead.

    Args:
        left: width of A: the number of features of the outputs.
        right: width of B: the number of features of the inputs.
        dim: number of features k. A parameter has up to left * right features; a ``SparseProjection`` adds those of all
            parameters up to k. None: they stay side by side, and k grows with the number of layers.
        axes: "random" or "principal".
        sample: number of training examples for principal axes; all of them if there are fewer.
    """

    left: int = 16
    right: int = 16
    dim: int | None = None
    axes: Literal["random", "principal"] = "random"
    sample: int = 512

    def __post_init__(self) -> None:
        self._require_positive("left", "right", "sample")
        require_one_of("axes", self.axes, ("random", "principal"))
        if self.dim is not None:
            self._require_positive("dim")

    @property
    def sample_size(self) -> int:
        """Number of training examples that principal axes need; 0 for random signs."""
        return self.sample if self.axes == "principal" else 0

    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundKroneckerProjection:
        """Fix the projection for one checkpoint, see :meth:`Projection.bind`."""
        return BoundKroneckerProjection(self, shapes, seed, checkpoint, device)


class BoundKroneckerProjection(BoundProjection):
    """A :class:`KroneckerProjection` of one checkpoint's parameters, made by its ``bind``."""

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
        self._principal = config.axes == "principal"
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A and B of a parameter, float32 of shapes (rows, left) and (columns, right).

        Raises:
            RuntimeError: if the axes are principal and have not been fitted.
        """
        if name not in self._factors:
            if self._principal:
                raise RuntimeError(
                    "The principal axes are not known yet: call `fit` with training gradients and give what it returns "
                    "to `set_fit`."
                )
            with torch.inference_mode(False):  # they are used outside the inference mode of this hook, too
                left, right = (
                    self._signs(f"KroneckerProjection/{side}", name, length, width)
                    if length != width
                    else torch.eye(width, device=self._device)
                    for side, length, width in self._sides(name)
                )
            self._factors[name] = left, right
        return self._factors[name]

    def fit(self, batches: Iterable[SampleBatch]) -> dict[str, Tensor]:
        """Find principal axes, see :meth:`BoundProjection.fit`."""
        if not self._principal:
            return super().fit(batches)
        found = {
            (name, side): PrincipalAxes(width, partial(self._signs, f"PrincipalAxes/{side}", name, length), length)
            for name in self._matrices
            for side, length, width in self._sides(name)
        }
        for gradients in (part for batch in batches for part in batch.gradients()):
            for name, rows in gradients.items():
                matrices = rows.view(len(rows), *self._matrices[name])
                found[name, "left"].update(matrices)
                found[name, "right"].update(matrices.mT)
        return {f"{side}.{name}": axes.compute() for (name, side), axes in found.items()}

    def set_fit(self, fitted: Mapping[str, Tensor]) -> None:
        """Use these axes, see :meth:`BoundProjection.set_fit`."""
        if not self._principal:
            return super().set_fit(fitted)
        for name in self._matrices:
            left, right = (fitted[f"{side}.{name}"].to(self._device) for side in ("left", "right"))
            self._factors[name] = left, right
        return None

    def _sides(self, name: str) -> Iterable[tuple[str, int, int]]:
        """Each side's name, length and width."""
        return zip(("left", "right"), self._matrices[name], self._cores[name], strict=True)

    def _signs(self, purpose: str, name: str, length: int, width: int) -> Tensor:
        stream = Stream.derive(purpose, self._seed, self._checkpoint, name)
        return RademacherProjection(width).block(stream, range(length), self._device)

    def scaled(self, name: str, cores: Tensor) -> Tensor:
        """The part of a parameter in the features, before the parts of all parameters are added up.

        Args:
            name: name of the parameter.
            cores: A^T G B for each example, of shape (batch, left, right) or flattened, with A and B from
                :meth:`factors`.

        Returns:
            Shape (batch, left * right).
        """
        # Inner products are kept if entries have variance 1 / width. Signs have variance 1, so they are scaled here.
        # Principal axes have length 1 and need no scale.
        random = [width for _, length, width in self._sides(name) if length != width and not self._principal]
        return cores.flatten(1) * math.prod(1 / math.sqrt(width) for width in random)

    def add_joined_(self, features: Tensor, names: Sequence[str], parts: Sequence[Tensor]) -> None:
        """Add the parts of several parameters, by one operation if all have the same features.

        Args:
            features: features so far, float32 or float64 of shape (batch, dim).
            names: names of the parameters.
            parts: the parts of these parameters, as from :meth:`scaled`.
        """
        if isinstance(self._together, BoundSparseProjection):
            self._together.add_joined_(features, names, parts)
            return
        for name, part in zip(names, parts, strict=True):
            self._together.add_(features, name, part)

    def _add(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        dtype = torch.promote_types(gradients.dtype, torch.float32)
        left, right = (factor.to(dtype) for factor in self.factors(name))
        columns = self._matrices[name][1]
        first = start // columns
        left = left[first : first + gradients.shape[1] // columns]
        gradients = gradients.to(dtype)
        if columns == 1:
            cores = gradients @ left * right  # right is one number
        else:
            cores = left.T @ (gradients.view(len(gradients), -1, columns) @ right)
        self._together.add_(features, name, self.scaled(name, cores))
