"""From a batch to features at one checkpoint: per-example gradients, projected."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor, nn
from torch.backends import cudnn

from lightning_trak.checkpoints.copies import Original, copy_module
from lightning_trak.checkpoints.reading import Checkpoint
from lightning_trak.features.store import Features
from lightning_trak.gradients import (
    FunctionalEngine,
    GradientEngine,
    HookEngine,
    LoopEngine,
    MixedEngine,
    ParameterSelection,
    coverage_report,
    select_parameters,
)
from lightning_trak.gradients.audit import Audit, require_independent
from lightning_trak.gradients.base import EngineError, real_shape
from lightning_trak.gradients.batch import ExampleBatch, Layout, infer_batch_size
from lightning_trak.gradients.precision import to_store_dtype
from lightning_trak.gradients.soundness import require_repeatable
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, modules_of
from lightning_trak.projections import Projection
from lightning_trak.projections.base import BoundProjection
from lightning_trak.running.data import draw_audited
from lightning_trak.storage.files import tensor_digest

_told = WarningCache()  # says a thing once

EngineName = Literal["auto", "functional", "hooks", "loop"]
# From the fastest to the one that differentiates anything.
ENGINES: tuple[EngineName, ...] = ("hooks", "functional", "loop")
_HOW = {"hooks": "module hooks", "functional": "vmap", "loop": "a loop over examples"}

# Per-example gradients of a sub-batch may take this much memory; larger batches are cut.
GRADIENT_BYTES = 1 << 29


class FeatureExtractor:
    """Computes features on its own copy of the user's module, which itself is never touched.

    Args:
        module: the trained model.
        output: the scalar output to differentiate.
        checkpoints: the weights, one set per checkpoint.
        digests: their fingerprints.
        projection: what compresses gradients to k numbers.
        parameters: which parameters to differentiate, see :func:`~lightning_trak.gradients.select_parameters`.
        engine: ``"hooks"``, the fastest, where vmap does the parameters that hooks do not cover; ``"functional"``
            (vmap); ``"loop"``; or ``"auto"``: what :meth:`choose_engine` found, vmap until :meth:`use_engine` is told,
            and the loop, with a warning, for batches that fail in vmap.
        seed: seed of the projection.
        dtype: dtype of the features.
        keep: keep the weights and projection of every checkpoint in memory, for going through all of them repeatedly.
        audit: how many examples of a shard are to be differentiated again.

    Attributes:
        places: what to call each checkpoint in messages.
        autocast: what forward passes of the hooks are autocast to, if anything; see :meth:`reset`.
        device: where the module is.
        layout: which parts of a batch belong to single examples, once that is known.
        sharded: whether ranks compute together.
    """

    sharded: ClassVar[bool] = False

    def __init__(
        self,
        module: nn.Module,
        output: ModelOutput,
        checkpoints: Sequence[Checkpoint],
        digests: Sequence[str],
        projection: Projection,
        parameters: ParameterSelection = None,
        engine: EngineName = "auto",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        keep: bool = False,
        audit: int = 0,
    ) -> None:
        self._users = module
        self.module = self._copy(module)
        self._original = Original(self.module)
        self.output = copy.deepcopy(output)
        self.checkpoints = checkpoints
        self.digests = digests
        self.places = [f"at checkpoint {number} ({item.name})" for number, item in enumerate(checkpoints)]
        self.names = select_parameters(self.module, parameters)
        shapes = {name: real_shape(parameter) for name, parameter in self.module.named_parameters()}
        self.shapes = {name: shapes[raw] for name, raw in self.names.items()}
        self.sizes = {name: shape.numel() for name, shape in self.shapes.items()}
        self.projection = projection
        self.engine_name = engine
        self.seed = seed
        self.dtype = dtype
        self.layout: Layout | None = None
        self._keep = keep
        self.audit = audit
        # cuDNN cannot differentiate a recurrent layer in eval mode.
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in self.module.modules())
        self.reset()

    @staticmethod
    def _copy(module: nn.Module) -> nn.Module:
        return copy_module(module)

    def _begin(self) -> None:
        self._slow = LoopEngine(self.module, self.output, self.names)
        self.use_engine("functional" if self.engine_name == "auto" else self.engine_name)
        self.undecided = self.engine_name == "auto"

    def choose_engine(self, batch: Any, size: int) -> tuple[EngineName, str]:
        """Hooks where they cover most of the parameters and agree with autograd on some examples, else vmap.

        Vmap takes the parameters that hooks do not cover. That is a second differentiation: where most of the gradient
        would come from it, it had better do all.

        Args:
            batch: examples on the module's device. The choice depends on them, so they should always be the same.
            size: their number; a single one does not show which dimension the examples are in.

        Returns:
            The engine and the reason, for people.
        """
        left_out = HookEngine.uncovered(self.module, self.names)
        report = coverage_report(left_out, self.sizes)
        if 2 * sum(self.sizes[name] for name in left_out) > sum(self.sizes.values()):
            return "functional", report
        if size < 2:
            return "functional", "hooks cannot be checked on a single example"
        with self.differentiable():
            examples = ExampleBatch(batch, size, self.layout)
            try:
                wrong = self._hook_engine().check(examples)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # a model at fault will fail again, and be heard
                return "functional", f"hooks fail on the first examples: {error}".splitlines()[0][:200]
        if wrong:
            return "functional", "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
        return "hooks", report

    def use_engine(self, engine: EngineName) -> None:
        """Use an engine from now on: what ``"auto"`` was found to mean."""
        self.undecided = False
        self.used = engine
        self._hooks = self._hook_engine() if engine == "hooks" else None
        if engine == "loop":
            self._engine: GradientEngine = self._slow
        else:
            self._engine = self._hooks or FunctionalEngine(self.module, self.output, self.names)

    @property
    def how(self) -> str:
        """How gradients are computed, for people."""
        precision = ""
        if self.autocast:
            precision = " in bfloat16 mixed precision" if self._hooks else " in the precision of the weights"
        return _HOW[self.used] + precision

    def reset(self, autocast: torch.dtype | None = None) -> None:
        """Forget what has been loaded, which may be on a device or in a precision that is not used any more.

        Args:
            autocast: what forward passes of the hooks are autocast to from now on, if anything. The other engines
                compute in the precision of the weights.
        """
        self.autocast = autocast
        self._begin()
        self.current: int | None = None
        self.device = torch.device("cpu")
        self._loaded: dict[int, tuple[dict[str, Tensor], BoundProjection]] = {}
        self._seen = False

    def to_checkpoint(self, number: int, device: torch.device) -> None:
        """Load the weights of a checkpoint, and its projection.

        Raises:
            ValueError: if the weights do not fit the module, or their file has changed since this object was made.
        """
        checkpoint = self.checkpoints[number]
        with torch.inference_mode(False), torch.no_grad():
            if number not in self._loaded:
                if not self._keep:
                    self._loaded.clear()
                weights = checkpoint.load()
                if tensor_digest(weights) != self.digests[number]:
                    raise ValueError(f"{checkpoint.name} has changed since this TRAK was made; make another")
                bound = self.projection.bind(self.shapes, seed=self.seed, checkpoint=number, device=device)
                self._loaded[number] = (weights, bound)
            weights, self._bound = self._loaded[number]
            self._original.load(weights, checkpoint.name)
            self.module.eval()
            for part in modules_of(self.output):
                part.to(device).eval()
        self.current, self.device = number, device

    def __call__(self, batch: Any, positions: Tensor, audited: Mapping[int, Any] = MappingProxyType({})) -> Features:
        """Features of a batch at the current checkpoint.

        Args:
            batch: a batch on the module's device.
            positions: what to call its examples in messages, shape ``(n,)``; its length is the number of examples.
            audited: which of them to differentiate again, alone, by plain autograd; each with a batch of it twice over,
                or None, to take it out of this batch.

        Returns:
            Features on the module's device, which may still be at work on them: :func:`require_finite` looks at them.

        Raises:
            EngineError: if the engine gets a gradient wrong, and another one may do better.
            ValueError: if no engine can get it right.
        """
        whole = ExampleBatch(batch, len(positions), self.layout)
        with self.differentiable():
            # Hooks form the gradients of one layer at a time; the other engines those of all, and take fewer examples.
            step = whole.size if self._hooks else max(1, GRADIENT_BYTES // (sum(self.sizes.values()) * 4))
            parts = []
            for start in range(0, whole.size, step):
                rows = slice(start, min(start + step, whole.size))
                part = whole if step >= whole.size else whole.take(rows)
                some = {number - start: one for number, one in audited.items() if rows.start <= number < rows.stop}
                parts.append(self._rows(part, positions[rows], some))
            return Features.cat(parts)

    def draw(self, checkpoint: int, examples: range) -> list[int]:
        """Which of some examples to audit at a checkpoint: the same ones in every run."""
        return draw_audited(examples, self.audit, f"{self.seed}/{checkpoint}")

    @property
    def rounding(self) -> float:
        """The relative difference of outputs that rounding explains."""
        return self._engine.rounding

    def outputs_alone(self, examples: ExampleBatch) -> Tensor:
        """The output of each example in a batch of one, at the current checkpoint."""
        engine = (
            self._engine if self.sharded else LoopEngine(self.module, self.output, self.names, self._engine.autocast)
        )
        with self.differentiable(), torch.enable_grad():
            singles = (examples.take([number]) for number in range(examples.size))
            return torch.cat([engine.outputs(single).detach() for single in singles])

    def are_same(self, one: Any, other: Any) -> bool:
        """Whether two batches of twice the same example hold the same."""
        return ExampleBatch(one, 2, self.layout).equals(ExampleBatch(other, 2, self.layout))

    def require_sound(self, twice: Any, *others: Any) -> None:
        """Check that the output of an example depends on the copy of the module alone, and on no other example.

        Args:
            twice: a batch of twice the first example.
            others: a batch of twice another example, and one of both; nothing to leave the second check out.

        Raises:
            ValueError: if it does not.
        """
        with self.differentiable():
            batches = [ExampleBatch(batch, 2, self.layout) for batch in (twice, *others)]
            first, _ = self._slow.one(batches[0], 0, self._users)
            what = f"the output of {type(self.module).__name__}"
            require_repeatable(lambda: self._slow.alone(batches[0], 0).detach(), what, first)
            if not others or not first.isfinite().all():
                return  # what is not finite is refused in other words
            alone = torch.cat([first, self._slow.alone(batches[1], 0)])
            require_independent(self._slow, batches[2], alone, f"the first example {self.places[self.current or 0]}")

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Outside what Lightning predicts in.

        In inference mode nothing can be differentiated. Autocast is for the forward passes of hooks, which enter it
        themselves; vmap cannot always follow it.
        """
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            cudnn.flags(enabled=False) if self._recurrent else nullcontext(),
        ):
            yield

    @property
    def _working(self) -> torch.dtype:
        """What gradients are projected in."""
        weights = next(iter(self._engine.parameters.values()))
        return torch.promote_types(weights.real.dtype if weights.is_complex() else weights.dtype, torch.float32)

    def _rows(self, batch: ExampleBatch, positions: Tensor, audited: Mapping[int, Any]) -> Features:
        working = self._working
        try:
            engine, features, outputs = self._engine, *self._project(self._engine, batch, working)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            if self.sharded or self._engine is self._slow:
                raise
            # If this fails too, the model is at fault: let it say so.
            engine, features, outputs = self._slow, *self._project(self._slow, batch, working)
            self._give_way(error)
        place = self.places[self.current or 0]
        if audited:
            names = {number: f"example {int(positions[number])} {place}" for number in audited}
            self._audit(engine, batch, features, outputs, audited, names)
        features = to_store_dtype(features, self.dtype, positions, place)
        loss_gradients, curvatures = self.output.derivatives(outputs)
        scalar = torch.promote_types(self.dtype, torch.float32)  # k numbers dwarf these three: no need to round them
        if not self._seen and not features.any():
            warnings.warn(
                f"all features of examples {int(positions[0])} to {int(positions[-1])} {self.places[self.current or 0]}"
                f" are zero: does the output {type(self.output).__name__} depend on the selected parameters?",
                stacklevel=2,
            )
        self._seen = True
        return Features(features, outputs.to(scalar), loss_gradients.to(scalar), curvatures.to(scalar))

    def _audit(
        self,
        engine: GradientEngine,
        batch: ExampleBatch,
        features: Tensor,
        outputs: Tensor,
        audited: Mapping[int, Any],
        names: Mapping[int, str],
    ) -> None:
        """Differentiate some examples again: see :meth:`__call__`."""
        reference = LoopEngine(self.module, self.output, self.names, engine.autocast)
        audit = Audit(engine, reference, self._bound, self._users)
        for number, twice in audited.items():
            single = None if twice is None else ExampleBatch(twice, 2, self.layout).take([0])
            audit(batch, number, features, outputs, names[number], single)

    def _project(self, engine: GradientEngine, batch: ExampleBatch, working: torch.dtype) -> tuple[Tensor, Tensor]:
        """The examples' projected gradients and outputs, in a working precision."""
        features = torch.zeros(batch.size, self._bound.dim, dtype=working, device=self.device)
        return features, engine.project(batch, self._bound, features).to(working)

    def _give_way(self, error: Exception) -> None:
        """What it means that an engine fails where the loop does not.

        Raises:
            EngineError: if it must not give way for a single batch.
        """
        said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if self._hooks or self.engine_name != "auto":
            if isinstance(error, EngineError):
                raise error
            raise EngineError(f"{self.how} cannot differentiate {type(self.module).__name__}: {said}") from error
        # Batch by batch, not once for all: a batch must have the same features whichever others came before.
        _told.warn(
            f"vmap cannot differentiate {type(self.module).__name__}, so its examples are differentiated one by one,"
            f" which is slow; engine='loop' does so without saying. {said}"
        )

    def _hook_engine(self) -> HookEngine | MixedEngine:
        left_out = HookEngine.uncovered(self.module, self.names)
        if len(left_out) == len(self.names):
            raise EngineError(f"engine='hooks' is of no use here: {coverage_report(left_out, self.sizes)}")
        if left_out:
            return MixedEngine(self.module, self.output, self.names, left_out, self.autocast)
        return HookEngine(self.module, self.output, self.names, self.autocast)

    def fit_projection(self, batches: Iterable[tuple[Any, int]]) -> dict[str, Tensor]:
        """What the projection learns from training examples at this checkpoint.

        Args:
            batches: batches on the module's device, each with its number of examples.
        """

        def gradients() -> Iterator[dict[str, Tensor]]:
            step = max(1, GRADIENT_BYTES // (sum(self.sizes.values()) * 4))
            for batch, size in batches:
                examples = ExampleBatch(batch, size, self.layout)
                for start in range(0, size, step):
                    yield self._gradients(examples.take(slice(start, min(start + step, size))))

        with self.differentiable():
            return self._bound.fit(gradients())

    def set_projection_fit(self, fitted: dict[str, Tensor]) -> None:
        """Use what :meth:`fit_projection` returned."""
        self._bound.set_fit(fitted)

    def _gradients(self, batch: ExampleBatch) -> dict[str, Tensor]:
        try:
            return self._engine(batch)[1]
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception:
            if self.engine_name != "auto" or self.sharded:
                raise
            return self._slow(batch)[1]  # featurizing will tell of it

    def make_context(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        """What the model output wants to remember of the data at this checkpoint."""
        with self.differentiable(), exact_attention():
            fresh = (ExampleBatch(batch, infer_batch_size(batch), self.layout).fresh() for batch in batches)
            return {name: tensor.clone() for name, tensor in self.output.make_context(self.module, fresh).items()}
