"""Hooks for the parameters that they cover, and vmap for the others."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lightning_trak.gradients.base import GradientEngine
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.functional import FunctionalEngine
from lightning_trak.gradients.hooks.engine import HookEngine
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections.base import BoundProjection


class MixedEngine(GradientEngine):
    """A :class:`HookEngine` and a :class:`FunctionalEngine` together: two forward and backward passes.

    Args:
        module: the model.
        output: the scalar output that is differentiated.
        names: canonical parameter name -> name in ``module``. Only these parameters are differentiated.
        vmapped: the canonical names to differentiate by vmap: some of ``names``, but not all.
        autocast: as for :class:`HookEngine`. The pass by vmap runs without autocast, since vmap does not support it in
            normalisations and attention.
    """

    def __init__(
        self,
        module: nn.Module,
        output: ModelOutput,
        names: dict[str, str],
        vmapped: Collection[str],
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(module, output, names, autocast)
        hooked = {name: raw for name, raw in names.items() if name not in vmapped}
        self._hooks = HookEngine(module, output, hooked, autocast)
        self._vmap = FunctionalEngine(module, output, {name: names[name] for name in vmapped})

    @property
    def parts(self) -> tuple[HookEngine, FunctionalEngine]:
        """The engine of the parameters that hooks cover, and that of the others."""
        return self._hooks, self._vmap

    def on(self, module: nn.Module, output: ModelOutput) -> MixedEngine:
        """See :meth:`GradientEngine.on`."""
        return MixedEngine(module, output, self.names, list(self._vmap.names))

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiate all examples in two passes."""
        values, rows = self._hooks(batch)
        rows |= self._vmap(batch)[1]
        return values, {name: rows[name] for name in self.names}

    def project(self, batch: ExampleBatch, projection: BoundProjection, features: Tensor) -> Tensor:
        """Project both engines' gradients, see :meth:`GradientEngine.project`."""
        self._vmap.project(batch, projection, features)
        return self._hooks.project(batch, projection, features)

    def check(self, batch: ExampleBatch) -> dict[str, str]:
        """See :meth:`HookEngine.check`."""
        return self._hooks.check(batch)
