"""The audit: plain autograd differentiates some examples again, one at a time, and their features must be the same."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_trak.gradients.base import EngineError, GradientEngine
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks import HookEngine, MixedEngine
from lightning_trak.gradients.loop import LoopEngine
from lightning_trak.gradients.precision import in_double, output_in_double
from lightning_trak.gradients.trials import require_repeatable
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.base import close
from lightning_trak.projections.base import BoundProjection
from lightning_trak.texts.messages import listed


class Audit:
    """Compares the feature of an example with the one that plain autograd gives for this example alone.

    Args:
        engine: the engine that computed the features.
        reference: an engine that differentiates one example at a time, in the same precision.
        projection: the projection of the gradients.
        original: the user's module. The copy must not depend on it.
    """

    def __init__(
        self, engine: GradientEngine, reference: LoopEngine, projection: BoundProjection, original: nn.Module
    ) -> None:
        self._engine = engine
        self._reference = reference
        self._projection = projection
        self._original = original
        self._dtype = reference.precision
        self._tolerance = reference.rounding

    def __call__(
        self,
        batch: ExampleBatch,
        number: int,
        features: Tensor,
        outputs: Tensor,
        name: str,
        single: ExampleBatch | None,
    ) -> None:
        """Compare one example.

        Args:
            batch: the batch that was featurized.
            number: the index in the batch of the example to differentiate again.
            features: features of the batch, shape ``(size, k)``.
            outputs: outputs of the batch, shape ``(size,)``.
            name: the name of the example in errors.
            single: a batch that holds this example only; None: the example is taken out of ``batch``.

        Raises:
            EngineError: if the engine gave another feature. The error names the parameters with wrong gradients.
            ValueError: if the output depends on other examples or on tensors outside the copy, or changes each time.
        """
        source, row = (batch, number) if single is None else (single, 0)
        alone, gradients = self._reference.one(source, row, self._original)
        if not bool(outputs[number].isfinite()) or not bool(features[number].isfinite().all()):
            return  # other code refuses what is not finite, and names the example
        expected = self._projected(gradients, features)
        noise = 1e-2 * self._tolerance * float(features.norm(dim=1).nan_to_num(0, 0, 0).max())
        off = float((features[number] - expected).norm())
        near = off <= self._tolerance * float(expected.norm()) + noise
        same_output = close(outputs[number : number + 1], alone, self._tolerance)
        together = single is not None and isinstance(self._engine, (HookEngine, MixedEngine))
        if not (together and near and same_output):  # else the batch gave the same as the example alone
            self._require_independent(batch, number, alone, name, source, row)
        if same_output and near:
            return
        if same_output and single is not None:
            self._require_same_content(batch, number, name, source, row)
        if same_output and self._explained_by_kinks(source, row, features[number]):
            return
        if isinstance(self._engine, LoopEngine):
            again = self._projected(self._reference.one(batch, number)[1], features)
            if same_output and float((features[number] - again).norm()) <= self._tolerance * float(again.norm()):
                raise ValueError(_other_content(_OTHER_GRADIENT.format(name)))
            raise ValueError(
                f"{name}: the output or its gradient changes each time that it is computed. Draw random numbers from a"
                " generator with a fixed seed, leave noise out in eval mode, and keep no state between calls"
            )
        share = off / max(float(expected.norm()), torch.finfo(expected.dtype).tiny)
        what = (
            f"its gradient is off by {share:.2g} of its norm{self._at_fault(batch, number, gradients)}"
            if same_output
            else f"its output is {float(outputs[number]):.6g}, and plain autograd has {float(alone):.6g}"
        )
        raise EngineError(f"{name}: {what}, compared with plain autograd on this example alone")

    def _projected(self, gradients: dict[str, Tensor], like: Tensor) -> Tensor:
        feature = torch.zeros(1, self._projection.dim, dtype=like.dtype, device=like.device)
        for name, row in gradients.items():
            self._projection.add_(feature, name, row)
        return feature[0]

    def _require_independent(
        self, batch: ExampleBatch, number: int, alone: Tensor, name: str, source: ExampleBatch, row: int
    ) -> None:
        reference = self._reference
        with torch.no_grad():
            require_repeatable(
                lambda: reference.alone(source, row), f"{name}: the output of {type(reference.module).__name__}", alone
            )
            if not close(reference.alone(batch, number), alone, self._tolerance):
                raise ValueError(_other_content(_differs(name, alone)))
            if batch.size > 1 and not batch.is_one_by_one:
                other = (number + 1) % batch.size
                both = torch.cat([alone, reference.alone(batch, other)])
                require_independent(reference, batch.take([number, other]), both, name)

    def _require_same_content(
        self, batch: ExampleBatch, number: int, name: str, source: ExampleBatch, row: int
    ) -> None:
        """Check that the example has the same gradient in this batch as when it is loaded alone.

        Padding may change a gradient more than an output. In float64 no kink explains a difference.
        """
        try:
            reference = self._reference.on(*self._in_double())
            (_, here), (_, alone) = (
                reference.one(replace(whole, content=in_double(whole.content)), place)
                for whole, place in ((batch, number), (source, row))
            )
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError):  # such as a model that casts to float32 itself
            return
        if _distance(here, alone) > self._tolerance * _norm(alone):
            raise ValueError(_other_content(_OTHER_GRADIENT.format(name)))

    def _in_double(self) -> tuple[nn.Module, ModelOutput]:
        return copy.deepcopy(self._reference.module).double(), output_in_double(self._reference.output)

    def _at_fault(self, batch: ExampleBatch, number: int, expected: dict[str, Tensor]) -> str:
        """The parameters whose gradients differ, as part of an error message."""
        try:
            rows = self._engine(batch)[1]
        except (RuntimeError, TypeError, ValueError, IndexError):
            return ""
        scale = sum(float(row.norm()) ** 2 for row in expected.values()) ** 0.5
        wrong = [
            name
            for name, row in expected.items()
            if float((rows[name][number] - row[0]).norm()) > self._tolerance * (float(row.norm()) + 1e-2 * scale)
        ]
        return f", in {listed(wrong, 5)}" if wrong else ""

    def _explained_by_kinks(self, batch: ExampleBatch, number: int, feature: Tensor) -> bool:
        """Whether engine and autograd agree in float64, so that the difference comes from a kink.

        A kink is a rectifier near zero, or a maximum of nearly equal numbers. Rounding decides there which of two
        gradients is taken. Kernels round differently for one example than for many.
        """
        if self._dtype == torch.float64:
            return False
        pair = batch.take([number, (number + 1) % batch.size] if batch.size > 1 else [number])
        pair = replace(pair, content=in_double(pair.content))
        module, output = self._in_double()
        try:
            rows = self._engine.on(module, output)(pair)[1]
            _, expected = self._reference.on(module, output).one(pair, 0)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError):  # such as a model that casts to float32 itself
            return False
        off = _distance({name: rows[name][:1] for name in expected}, expected)
        whole = self._projected(expected, feature.double())
        near = float((feature.double() - whole).norm()) <= kinks(self._dtype) * float(whole.norm())
        return off <= 1e-6 * _norm(expected) and near


def kinks(dtype: torch.dtype) -> float:
    """The share of a gradient's norm that rounding may change at kinks: rectifiers near zero, nearly equal maxima."""
    return {torch.float64: 1e-6, torch.float32: 0.05}.get(dtype, 0.5)


def require_independent(reference: LoopEngine, pair: ExampleBatch, alone: Tensor, name: str) -> None:
    """Check that the output of an example does not depend on the other examples in the batch.

    Args:
        reference: the engine that takes examples alone.
        pair: two examples.
        alone: the output of each of them alone, shape ``(2,)``.
        name: the name of the first one in errors.

    Raises:
        ValueError: if it depends on them, or the derivatives of its loss do.
    """
    if not reference.same_in_batch(pair, alone, reference.rounding):
        same_content = pair.is_one_by_one or close(  # one of joined examples cannot be taken out
            torch.cat([reference.alone(pair, number).detach() for number in range(2)]), alone, reference.rounding
        )
        raise ValueError((_dependent if same_content else _other_content)(_differs(name, alone)))
    output = reference.output
    of_each = zip(*(output.derivatives(value) for value in torch.split(alone, 1)), strict=True)
    for together, apart in zip(output.derivatives(alone), map(torch.cat, of_each), strict=True):
        if not close(together, apart, reference.rounding):
            raise ValueError(
                f"{name}: {type(output).__name__}.loss gives it another loss beside the output of another example;"
                " the loss of each example must depend on its own output alone"
            )


_OTHER_GRADIENT = "{}: its gradient is not the same alone and in a batch with others"
_PADDING = "padding that is not masked (mask it, pad all examples to one length, or use batch_size=1)"


def _norm(gradients: dict[str, Tensor]) -> float:
    return math.hypot(*(float(row.norm()) for row in gradients.values()))


def _distance(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return _norm({name: gradients[name] - row for name, row in expected.items()})


def _dependent(what: str) -> str:
    return (
        f"{what}. An output that depends on the rest of the batch has no gradient of its own. Three"
        " causes are common: in-batch contrastive losses (use ContrastiveMargin), batch normalisation without running"
        f" statistics, and {_PADDING}"
    )


def _other_content(what: str) -> str:
    return (
        f"{what}, because the batch holds other numbers than the examples have when they are loaded"
        " alone. Three causes are common: items that differ each time that they are loaded (leave random augmentation"
        f" out), a collate_fn that sorts, mixes or normalises the examples of a batch, and {_PADDING}"
    )


def _differs(name: str, alone: Tensor) -> str:
    return f"{name}: its output is {float(alone[0]):.6g} alone and another number in a batch with another example"
