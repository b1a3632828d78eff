"""Exact gradients in a store: each parameter's in its shortest form."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.gradients import GradientEngine
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.factors import GradientForms, find_forms
from lightning_trak.projections.base import BoundProjection
from lightning_trak.projections.factors import BoundGradientFactors


@dataclass(frozen=True, eq=False)
class FactorExtractor(FeatureExtractor):
    """Writes gradients in the forms of :mod:`lightning_trak.gradients.hooks.factors`, and audits the gradients."""

    @cached_property
    def _forms(self) -> GradientForms:
        assert isinstance(self.projection, BoundGradientFactors)
        return GradientForms.from_tensors(self.projection.fitted)

    @override
    def fit_projection(self, batches: Iterable[tuple[Any, Sequence[int]]]) -> dict[str, Tensor]:
        forms: GradientForms | None = None
        with self.model.differentiable():
            for batch, positions in batches:
                found = find_forms(self.engine, ExampleBatch(batch, len(positions), self.layout))
                forms = found if forms is None else forms.merged(found)
        assert forms is not None
        return forms.to_tensors()

    @override
    def _projected(self, batch: ExampleBatch, projection: BoundProjection) -> tuple[GradientEngine, Tensor, Tensor]:
        if self._forms.are_whole:
            return super()._projected(batch, projection)
        return self.engine, *self._project(self.engine, batch, projection)  # no other engine can take its place

    @override
    def _project(
        self, engine: GradientEngine, batch: ExampleBatch, projection: BoundProjection
    ) -> tuple[Tensor, Tensor]:
        stored = torch.zeros(batch.size, self._forms.width, dtype=self._working, device=self.model.device)
        return stored, self._forms.collect(engine, batch, stored).to(self._working)

    @override
    def _compared(
        self, batch: ExampleBatch, number: int, sketches: Tensor, outputs: Tensor
    ) -> tuple[ExampleBatch, int, Tensor, Tensor]:
        pair = [number, (number + 1) % batch.size][: batch.size]  # whole gradients of a batch may not fit in memory
        return batch.take(pair), 0, self._forms.gradients(sketches[pair]), outputs[pair]
