"""A projection of gradients that an optimizer has preconditioned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from lightning_trak.projections.base import BoundProjection


class PreconditionedProjection(BoundProjection):
    """P D, where P is a projection and D is a diagonal matrix: each element of a gradient is multiplied by a number.

    Args:
        projection: P, which is not fitted to data.
        shapes: shape of each parameter, by name.
        factors: the diagonal of D for each parameter, of its shape, on the device of the gradients. The factor 0 stands
            for an element whose factor is not known.
        place: names the checkpoint in errors.
    """

    def __init__(
        self,
        projection: BoundProjection,
        shapes: Mapping[str, Sequence[int]],
        factors: Mapping[str, Tensor],
        place: str,
    ) -> None:
        super().__init__(shapes, projection.dim)
        self._projection = projection
        self._factors = {name: projection.flattened(name, factors[name].unsqueeze(0))[0] for name in shapes}
        self._unknown = {name for name, factor in self._factors.items() if not bool(factor.all())}
        self._place = place

    @override
    def flattened(self, name: str, gradients: Tensor) -> Tensor:
        return self._projection.flattened(name, gradients)

    @override
    def _add(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        factor = self._factors[name].narrow(0, start, gradients.shape[1])
        gradients = gradients.to(torch.promote_types(gradients.dtype, torch.float32))
        # A second moment is zero, too, where the squares of all gradients have been too small for float32.
        if name in self._unknown and bool(gradients[:, factor == 0].float().square().any()):
            raise ValueError(
                f"gradients of {name} are not zero in elements of which the optimizer has seen no gradient"
                f" {self._place}, so that it is not known how it would scale them: train longer before the snapshot, or"
                " leave this parameter out with parameters="
            )
        self._projection._add(features, name, gradients * factor, start)
