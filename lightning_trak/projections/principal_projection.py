"""Principal features: the directions of the gradients that carry influence, learned from training examples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_trak.projections.base import BoundProjection, Projection, SampleBatch
from lightning_trak.projections.identity import IdentityProjection
from lightning_trak.projections.landmarks import Landmarks
from lightning_trak.projections.sparse import SparseProjection


@dataclass(frozen=True)
class PrincipalProjection(Projection):
    """Project gradients to the directions that carry most influence, which are learned from examples.

    A wide :class:`SparseProjection` first maps a gradient g to a sketch s, so that any model and any engine will do. Of
    a sample of the training set, the examples with the largest ``sqrt(R) |s|^2`` become landmarks; R = d2l/df2 is the
    curvature of the loss. An orthonormal V holds the k directions in which sum_i sqrt(R_i) s_i s_i^T over the landmarks
    is largest, measured by the inverse of H = sum_i R_i s_i s_i^T + lambda: TRAK's scores are inner products in that
    inverse. Features are V^T s. Few examples carry most of the curvature, so few landmarks are enough.

    Each checkpoint has its own sample and its own V. To learn V takes one more pass over the sample, and about
    landmarks^2 (2 sketch + 12 landmarks) + 2 landmarks sketch k operations in float64. The landmarks take 4 landmarks
    sketch bytes of memory meanwhile. The store keeps V in bfloat16, 2 sketch k bytes at each checkpoint: 64 MiB with
    the defaults. In memory, V takes twice as much. To apply V takes 2 sketch k operations for each example.

    If the landmarks span fewer than k directions (there are fewer examples, for example), the last features are zero.
    If R is zero for all of the sample, as with a loss that is linear in the output, all examples weigh alike.

    Args:
        dim: number of principal features k.
        landmarks: number of examples that V is learned from, at least ``dim``.
        sample: number of training examples that landmarks are chosen from; all of them if there are fewer.
        sketch: length of a sketch. A model with no more parameters than that needs no sketch: s is g.
        cache_bytes: as for :class:`SparseProjection`.
    """

    dim: int = 1024
    landmarks: int = 2048
    sample: int = 8192
    sketch: int = 32768
    cache_bytes: int = field(default=1 << 30, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        self._require_positive("dim", "landmarks", "sample", "sketch")
        for small, large in (("dim", "landmarks"), ("landmarks", "sample"), ("dim", "sketch")):
            if getattr(self, small) > getattr(self, large):
                raise ValueError(
                    f"Expected `{small}` to be at most `{large}`={getattr(self, large)} but got"
                    f" {small}={getattr(self, small)}."
                )

    @property
    def sample_size(self) -> int:
        """Number of training examples that V is learned from."""
        return self.sample

    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundPrincipalProjection:
        """Fix the projection for one checkpoint, see :meth:`Projection.bind`."""
        whole = sum(map(math.prod, shapes.values())) <= self.sketch
        inner = IdentityProjection() if whole else SparseProjection(self.sketch, cache_bytes=self.cache_bytes)
        return BoundPrincipalProjection(self, shapes, inner.bind(shapes, seed, checkpoint, device), device)


class BoundPrincipalProjection(BoundProjection):
    """A :class:`PrincipalProjection` of one checkpoint's parameters, made by its ``bind``."""

    def __init__(
        self,
        config: PrincipalProjection,
        shapes: Mapping[str, Sequence[int]],
        sketch: BoundProjection,
        device: torch.device,
    ) -> None:
        super().__init__(shapes, config.dim)
        self._config = config
        self._sketch = sketch
        self._device = device
        self._basis: Tensor | None = None

    @property
    def sketch(self) -> BoundProjection:
        """The wide projection that V is applied to, see :attr:`BoundProjection.sketch`."""
        return self._sketch

    def fit(self, batches: Iterable[SampleBatch]) -> dict[str, Tensor]:
        """Learn V, see :meth:`BoundProjection.fit`.

        Raises:
            ValueError: if some R is negative.
        """
        landmarks = Landmarks(self._config.landmarks, self._sketch.dim, self._device)
        for batch in batches:
            sketches, loss_gradients, curvatures = batch.project(self._sketch)
            if (curvatures < 0).any():
                raise ValueError(
                    f"the second derivative of the loss is negative ({float(curvatures.min()):g}) for some training"
                    " example; PrincipalProjection needs a loss that is convex in the output: use SparseProjection"
                )
            landmarks.update(sketches, curvatures, loss_gradients)
        if not landmarks.curved:
            warnings.warn(
                "the loss has no curvature in the output at any example that PrincipalProjection was fitted to, so it"
                " keeps the directions in which the gradients are largest, and all examples weigh alike",
                stacklevel=2,
            )
        return {"basis": landmarks.basis(self._config.dim).to(torch.bfloat16)}

    def set_fit(self, fitted: Mapping[str, Tensor]) -> None:
        """Use this V, see :meth:`BoundProjection.set_fit`."""
        self._basis = fitted["basis"].to(self._device)

    def finish(self, sketches: Tensor) -> Tensor:
        """Multiply sketches by V, see :meth:`BoundProjection.finish`.

        Raises:
            RuntimeError: if V has not been learned.
        """
        if self._basis is None:
            raise RuntimeError(
                "The principal directions are not known yet: call `fit` with training examples and give what it returns"
                " to `set_fit`."
            )
        with torch.no_grad(), torch.autocast(sketches.device.type, enabled=False):
            basis = self._basis = self._basis.to(sketches.dtype)
            return sketches @ basis

    def flattened(self, name: str, gradients: Tensor) -> Tensor:
        """Flatten gradients in the order of :attr:`sketch`, see :meth:`BoundProjection.flattened`."""
        return self._sketch.flattened(name, gradients)

    def _add(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        dtype = torch.promote_types(gradients.dtype, torch.float32)
        sketches = gradients.new_zeros(len(gradients), self._sketch.dim, dtype=dtype)
        self._sketch._add(sketches, name, gradients, start)
        features.add_(self.finish(sketches))
