"""From a batch to features at one checkpoint: per-example gradients, projected."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal

import torch
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor, nn
from torch.backends import cudnn

from lightning_trak.checkpoints import Checkpoint
from lightning_trak.copies import copy_module, load_weights
from lightning_trak.files import tensor_digest
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
from lightning_trak.gradients.batch import fresh_batch, slice_batch
from lightning_trak.outputs import ModelOutput
from lightning_trak.precision import to_store_dtype
from lightning_trak.projections import Projection
from lightning_trak.projections.base import BoundProjection
from lightning_trak.store import Features

_told = WarningCache()  # says a thing once

EngineName = Literal["auto", "functional", "hooks", "loop"]

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
        engine: ``"hooks"``, the fastest, where vmap does the parameters that hooks do not cover and the first batch is
            checked against autograd; ``"functional"`` (vmap); ``"loop"``; or ``"auto"``: what :meth:`choose_engine`
            found, vmap until :meth:`use_engine` is told, and the loop, with a warning, for batches that fail in it.
        seed: seed of the projection.
        dtype: dtype of the features.
        keep: keep the weights and projection of every checkpoint in memory, for going through all of them repeatedly.

    Attributes:
        places: what to call each checkpoint in messages.
        autocast: what forward passes of the hooks are autocast to, if anything; see :meth:`reset`.
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
    ) -> None:
        self.module = self._copy(module)
        self.output = copy.deepcopy(output)
        self.checkpoints = checkpoints
        self.digests = digests
        self.places = [f"at checkpoint {number} ({item.name})" for number, item in enumerate(checkpoints)]
        self.names = select_parameters(self.module, parameters)
        shapes = {name: parameter.shape for name, parameter in self.module.named_parameters()}
        self.shapes = {name: shapes[raw] for name, raw in self.names.items()}
        self.sizes = {name: shape.numel() for name, shape in self.shapes.items()}
        self.projection = projection
        self.engine_name = engine
        self.seed = seed
        self.dtype = dtype
        self._keep = keep
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
        """Hooks where they cover every parameter and agree with autograd on some examples, else vmap.

        Hooks beside vmap would differentiate twice, which seldom pays.

        Args:
            batch: examples on the module's device. The choice depends on them, so they should always be the same.
            size: their number; a single one does not show which dimension the examples are in.

        Returns:
            The engine and the reason, for people.
        """
        left_out = HookEngine.uncovered(self.module, self.names)
        if left_out:
            return "functional", coverage_report(left_out, self.sizes)
        if size < 2:
            return "functional", "hooks cannot be checked on a single example"
        with self.differentiable():
            try:
                engine = HookEngine(self.module, self.output, self.names, self.autocast)
                wrong = engine.check(fresh_batch(batch, size), size)
            except torch.cuda.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError) as error:  # a model at fault will fail again, and be heard
                return "functional", f"hooks fail on the first examples: {error}".splitlines()[0][:200]
        if wrong:
            return "functional", "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
        return "hooks", coverage_report(left_out, self.sizes)

    def use_engine(self, engine: EngineName) -> None:
        """Use an engine from now on: what ``"auto"`` was found to mean."""
        self.undecided = False
        self._hooks = self._hook_engine() if engine == "hooks" else None
        if engine == "loop":
            self._engine: GradientEngine = self._slow
        else:
            self._engine = self._hooks or FunctionalEngine(self.module, self.output, self.names)

    def reset(self, autocast: torch.dtype | None = None) -> None:
        """Forget what has been loaded, which may be on a device or in a precision that is not used any more.

        Args:
            autocast: what forward passes of the hooks are autocast to from now on, if anything. The other engines
                compute in the precision of the weights.
        """
        self.autocast = autocast
        self._begin()
        self.current: int | None = None
        self._device = torch.device("cpu")
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
            load_weights(self.module, weights, checkpoint.name)
            self.module.eval()
        self.current, self._device = number, device

    def __call__(self, batch: Any, positions: Tensor) -> Features:
        """Features of a batch at the current checkpoint.

        Args:
            batch: a batch on the module's device.
            positions: what to call its examples in messages, shape ``(n,)``; its length is the number of examples.

        Returns:
            Features on the module's device, which may still be at work on them: :func:`require_finite` looks at them.
        """
        size = len(positions)
        with self.differentiable():
            batch = fresh_batch(batch, size)
            # Hooks form the gradients of one layer at a time; the other engines those of all, and take fewer examples.
            step = size if self._hooks else max(1, GRADIENT_BYTES // (sum(self.sizes.values()) * 4))
            parts = [
                self._rows(slice_batch(batch, size, start, start + step), positions[start : start + step])
                for start in range(0, size, step)
            ]
            return Features.cat(parts)

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Outside what Lightning predicts in.

        In inference mode nothing can be differentiated. Autocast is for the forward passes of hooks, which enter it
        themselves; vmap cannot always follow it.
        """
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self._device.type, enabled=False),
            cudnn.flags(enabled=False) if self._recurrent else nullcontext(),
        ):
            yield

    def _rows(self, batch: Any, positions: Tensor) -> Features:
        weights = next(iter(self._engine.parameters.values()))
        working = torch.promote_types(weights.dtype, torch.float32)
        features = torch.zeros(len(positions), self._bound.dim, dtype=working, device=self._device)
        outputs = self._project(batch, len(positions), features).to(working)
        features = to_store_dtype(features, self.dtype, positions, self.places[self.current or 0])
        residuals, curvatures = self.output.derivatives(outputs)
        scalar = torch.promote_types(self.dtype, torch.float32)  # k numbers dwarf these three: no need to round them
        if not self._seen and not features.any():
            warnings.warn(
                f"all features of examples {int(positions[0])} to {int(positions[-1])} {self.places[self.current or 0]}"
                f" are zero: does the output {type(self.output).__name__} depend on the selected parameters?",
                stacklevel=2,
            )
        self._seen = True
        return Features(features, outputs.to(scalar), residuals.to(scalar), curvatures.to(scalar))

    def _hook_engine(self) -> HookEngine | MixedEngine:
        left_out = HookEngine.uncovered(self.module, self.names)
        if len(left_out) == len(self.names):
            raise ValueError(f"engine='hooks' is of no use here: {coverage_report(left_out, self.sizes)}")
        if left_out:
            return MixedEngine(self.module, self.output, self.names, left_out, self.autocast)
        return HookEngine(self.module, self.output, self.names, self.autocast)

    def _project(self, batch: Any, size: int, features: Tensor) -> Tensor:
        """Add the examples' projected gradients to their features; returns their outputs."""
        if self._engine is self._slow:
            return self._slow.project(batch, size, self._bound, features)
        if self._hooks and self.engine_name == "hooks" and not self._seen:
            wrong = self._hooks.check(batch, size)
            if wrong:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
                raise ValueError(f"engine='hooks' gets some gradients wrong, use engine='auto': {reasons}")
        try:
            return self._engine.project(batch, size, self._bound, features)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            if "randomness" in str(error):
                raise ValueError(
                    f"the output of {type(self.module).__name__} is random in eval mode, so that it has no one"
                    " gradient: draw from a fixed generator, or leave the noise out when not training"
                ) from error
            if self.engine_name != "auto":
                raise
            # If this fails too, the model is at fault: let it say so.
            outputs = self._slow.project(batch, size, self._bound, features)
            reason = error
        # Batch by batch, not once for all: a batch must have the same features whichever others came before.
        name = "the hook engine" if self._hooks else "vmap"
        said = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
        _told.warn(
            f"{name} cannot differentiate {type(self.module).__name__}, so examples are differentiated one by one,"
            f" which is slow; engine='loop' does so without saying. {name} said: {said}"
        )
        return outputs

    def fit_projection(self, batches: Iterable[tuple[Any, int]]) -> dict[str, Tensor]:
        """What the projection learns from training examples at this checkpoint.

        Args:
            batches: batches on the module's device, each with its number of examples.
        """

        def gradients() -> Iterator[dict[str, Tensor]]:
            step = max(1, GRADIENT_BYTES // (sum(self.sizes.values()) * 4))
            for batch, size in batches:
                batch = fresh_batch(batch, size)
                for start in range(0, size, step):
                    count = min(step, size - start)
                    yield self._gradients(slice_batch(batch, size, start, start + count), count)

        with self.differentiable():
            return self._bound.fit(gradients())

    def set_projection_fit(self, fitted: dict[str, Tensor]) -> None:
        """Use what :meth:`fit_projection` returned."""
        self._bound.set_fit(fitted)

    def _gradients(self, batch: Any, size: int) -> dict[str, Tensor]:
        try:
            return self._engine(batch, size)[1]
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError):
            if self.engine_name != "auto":
                raise
            return self._slow(batch, size)[1]  # featurizing will warn of it

    def make_context(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        """What the model output wants to remember of the data at this checkpoint."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return {name: tensor.clone() for name, tensor in self.output.make_context(self.module, batches).items()}


def require_finite(rows: Features, positions: Tensor, where: str) -> None:
    """Check features, best on the host: a device would be waited for.

    Args:
        rows: features of some examples.
        positions: of the examples in the dataset, shape ``(n,)``.
        where: what to call the checkpoint.

    Raises:
        ValueError: if a feature or one of its scalars is not finite, naming the first such example.
    """
    finite = [column.isfinite().flatten(1).all(1) if column.ndim > 1 else column.isfinite() for column in rows]
    bad = ~torch.stack(finite).all(0)
    if bad.any():
        first = int(bad.nonzero()[0])
        values = ", ".join(f"{name} {float(getattr(rows, name)[first]):g}" for name in Features._fields[1:])
        raise ValueError(
            f"the feature of example {int(positions[first])} {where} is not finite ({values}; features are"
            f" {rows.features.dtype}): look for NaN or huge values in this example or the weights, or use a dtype with"
            " a larger range; nothing of its shard was written"
        )
