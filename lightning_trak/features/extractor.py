"""From a batch to features at one checkpoint: per-example gradients, projected."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_trak.features.dtypes import FeatureDtype
from lightning_trak.features.finiteness import NotFiniteError, named, not_finite
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.precision import to_store_dtype
from lightning_trak.features.rows import Features
from lightning_trak.gradients import FunctionalEngine, GradientEngine, HookEngine, LoopEngine, MixedEngine
from lightning_trak.gradients.audit import Audit
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.batch import ExampleBatch, Layout
from lightning_trak.projections.base import BoundProjection, SampleBatch
from lightning_trak.texts.messages import in_one_line

_warned: set[tuple[str, str]] = set()  # models and reasons that a warning has named

# Bytes that the per-example gradients of a sub-batch may take. Larger batches are cut.
GRADIENT_BYTES = 1 << 29


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """Computes features at the checkpoint whose weights the model has.

    Attributes:
        model: the copy of the user's module, at a checkpoint.
        engine: the engine that differentiates it.
        projection: the projection that compresses gradients to k numbers, bound to this checkpoint.
        dtype: how features are stored.
        layout: which parts of a batch belong to single examples, if that is known.
        falls_back: whether the examples of a batch that fails in vmap are differentiated one by one, with a warning.
    """

    model: ModelCopy
    engine: GradientEngine
    projection: BoundProjection
    dtype: FeatureDtype
    layout: Layout | None = None
    falls_back: bool = False

    def __call__(self, batch: Any, positions: Tensor, audited: Mapping[int, Any] = MappingProxyType({})) -> Features:
        """Features of a batch.

        Args:
            batch: a batch on the model's device.
            positions: numbers of the examples in messages, shape ``(n,)``; ``n`` is the number of examples.
            audited: the examples to differentiate again, alone, by plain autograd. Maps the row of an example to a
                batch that holds it twice, or to None, to take the example from this batch.

        Returns:
            Features on the model's device, which may still be computing them. They are not checked yet:
            :func:`~lightning_trak.features.finiteness.require_finite` does that.

        Raises:
            EngineError: if the engine gets a gradient wrong, but another engine may get it right.
            ValueError: if no engine can get it right.
        """
        whole = ExampleBatch(batch, len(positions), self.layout)
        with self.model.differentiable():
            parts = []
            for rows, part in self._parts(whole):
                some = {number - rows.start: one for number, one in audited.items() if rows.start <= number < rows.stop}
                parts.append(self._rows(part, positions[rows], some))
            return Features.cat(parts)

    def outputs_alone(self, examples: ExampleBatch) -> Tensor:
        """The outputs of the examples, each computed in a batch of one, shape ``(size,)``."""
        engine = self.engine if self.model.sharded else self._reference(self.engine.autocast)
        with self.model.differentiable(), torch.enable_grad():
            singles = (examples.take([number]) for number in range(examples.size))
            return torch.cat([engine.outputs(single).detach() for single in singles])

    def fit_projection(self, batches: Iterable[tuple[Any, Sequence[int]]]) -> dict[str, Tensor]:
        """Fit the projection to training examples, other than those whose gradients are not finite.

        Args:
            batches: batches on the model's device, each with the positions of its examples in the dataset.

        Returns:
            What the projection has learned, by name.

        Raises:
            NotFiniteError: if no gradient is finite.
        """
        finite: list[int] = []
        left_out: list[int] = []
        sample = (
            _SampleBatch(self, ExampleBatch(batch, len(positions), self.layout), positions, finite, left_out)
            for batch, positions in batches
        )
        with self.model.differentiable():
            fitted = self.projection.fit(sample)
        if left_out and not finite:
            raise NotFiniteError(
                f"{named(left_out)} {self.model.place}, to which the projection is fitted, are all not finite: look for"
                " NaN or huge values in the weights or the data",
                sorted(left_out),
            )
        return fitted

    def _parts(self, batch: ExampleBatch) -> Iterator[tuple[slice, ExampleBatch]]:
        """Parts of a batch, each small enough for the engine to project its gradients, and their rows.

        Hooks need memory for the gradients of one layer at a time. Other engines hold those of all layers.
        """
        return _cut(batch, batch.size if self._hooks else self._sub_batch)

    @property
    def _hooks(self) -> bool:
        return isinstance(self.engine, (HookEngine, MixedEngine))

    @property
    def _sub_batch(self) -> int:
        return max(1, GRADIENT_BYTES // (self.model.size * 4))

    @property
    def _working(self) -> torch.dtype:
        """The precision in which gradients are projected."""
        weights = next(iter(self.engine.parameters.values()))
        return torch.promote_types(weights.real.dtype if weights.is_complex() else weights.dtype, torch.float32)

    def _reference(self, autocast: torch.dtype | None = None) -> LoopEngine:
        return LoopEngine(self.model.module, self.model.output, self.model.names, autocast)

    def _rows(self, batch: ExampleBatch, positions: Tensor, audited: Mapping[int, Any]) -> Features:
        engine, sketches, outputs = self._projected(batch, self.projection.sketch)
        place = self.model.place
        if audited:
            names = {number: f"example {int(positions[number])} {place}" for number in audited}
            self._audit(engine, batch, sketches, outputs, audited, names)
        features = self.dtype.prepared(self.projection.finish(sketches))
        features = to_store_dtype(features, self.dtype.floating, positions, place)
        loss_gradients, curvatures = self.model.output.derivatives(outputs)
        scalar = torch.promote_types(
            self.dtype.floating, torch.float32
        )  # rounding these three would save almost no space
        return Features(features, outputs.to(scalar), loss_gradients.to(scalar), curvatures.to(scalar))

    def _audit(
        self,
        engine: GradientEngine,
        batch: ExampleBatch,
        sketches: Tensor,
        outputs: Tensor,
        audited: Mapping[int, Any],
        names: Mapping[int, str],
    ) -> None:
        """Differentiate some examples again, see :meth:`__call__`."""
        audit = Audit(engine, self._reference(engine.autocast), self.projection.sketch, self.model.original)
        for number, twice in audited.items():
            single = None if twice is None else ExampleBatch(twice, 2, self.layout).take([0])
            audit(*self._compared(batch, number, sketches, outputs), names[number], single)

    def _compared(
        self, batch: ExampleBatch, number: int, sketches: Tensor, outputs: Tensor
    ) -> tuple[ExampleBatch, int, Tensor, Tensor]:
        """What :class:`Audit` takes for one example: a batch, the example's number in it, features and outputs."""
        return batch, number, sketches, outputs

    def _projected(self, batch: ExampleBatch, projection: BoundProjection) -> tuple[GradientEngine, Tensor, Tensor]:
        """The engine that was used, and the examples' projected gradients and outputs."""
        engine = self._reference() if batch.is_one_by_one and self.falls_back else self.engine
        try:
            return engine, *self._project(engine, batch, projection)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if self.model.sharded or isinstance(engine, LoopEngine):
                raise
            # If the loop fails too, the model is at fault, and its own error is raised.
            loop = self._reference()
            found = self._project(loop, batch, projection)
            self._fall_back(error)
            return loop, *found

    def _project(
        self, engine: GradientEngine, batch: ExampleBatch, projection: BoundProjection
    ) -> tuple[Tensor, Tensor]:
        """The examples' projected gradients and outputs, in the working precision."""
        features = torch.zeros(batch.size, projection.dim, dtype=self._working, device=self.model.device)
        return features, engine.project(batch, projection, features).to(self._working)

    def _fall_back(self, error: Exception) -> None:
        """Warn or raise after the engine has failed on a batch that the loop can differentiate.

        Raises:
            EngineError: if the loop must not replace the engine.
        """
        kind = type(self.model.module).__name__
        cause = error.__cause__ if isinstance(error, EngineError) and isinstance(error.__cause__, Exception) else error
        reason = in_one_line(cause)
        if not (self.falls_back and isinstance(self.engine, FunctionalEngine)):
            if isinstance(error, EngineError):
                raise error
            engine = "module hooks" if self._hooks else "vmap"
            raise EngineError(f"{engine} cannot differentiate {kind}: {reason}") from error
        # Each batch decides for itself: its features must not depend on the batches before it.
        seen = kind, re.sub(r"\d+", "", reason)  # batches differ in the sizes that an error tells
        if seen not in _warned:
            _warned.add(seen)
            rank_zero_warn(
                f"vmap cannot differentiate {kind}, so its examples are differentiated one by one, which is slow;"
                f" use engine='loop' to do this without a warning. Reason: {reason}"
            )

    def _gradients(self, batch: ExampleBatch) -> dict[str, Tensor]:
        try:
            return self.engine(batch)[1]
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception:
            if not self.falls_back:
                raise
            return self._reference()(batch)[1]  # the warning comes when the batch is featurized


@dataclass(frozen=True)
class _SampleBatch(SampleBatch):
    """Training examples, and the extractor that differentiates them."""

    extractor: FeatureExtractor
    examples: ExampleBatch
    positions: Sequence[int]
    finite: list[int]
    left_out: list[int]

    def gradients(self) -> Iterator[dict[str, Tensor]]:
        """See :meth:`SampleBatch.gradients`."""
        for rows, part in _cut(self.examples, self.extractor._sub_batch):
            found = self.extractor._gradients(part)
            kept = self._kept(torch.stack([gradient.isfinite().all(1) for gradient in found.values()]).all(0), rows)
            yield {name: gradient[kept] for name, gradient in found.items()}

    def project(self, projection: BoundProjection) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`SampleBatch.project`."""
        model = self.extractor.model
        parts = []
        for rows, part in self.extractor._parts(self.examples):
            _, features, outputs = self.extractor._projected(part, projection)
            made = Features(features, outputs, *model.output.derivatives(outputs))
            kept = self._kept(~not_finite(made), rows)
            parts.append(Features(*(column[kept] for column in made)))
        found = Features.cat(parts)
        return found.features, found.loss_gradients, found.curvatures

    def _kept(self, finite: Tensor, rows: slice) -> Tensor:
        for position, good in zip(self.positions[rows], finite.tolist(), strict=True):
            (self.finite if good else self.left_out).append(position)
        return finite


def _cut(batch: ExampleBatch, step: int) -> Iterator[tuple[slice, ExampleBatch]]:
    """Parts of at most ``step`` examples, and their rows in the batch."""
    for start in range(0, batch.size, step):
        rows = slice(start, min(start + step, batch.size))
        yield rows, batch if step >= batch.size else batch.take(rows)
