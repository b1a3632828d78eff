"""From a batch to features at one checkpoint: per-example gradients, projected."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_trak.checkpoints import Checkpoint
from lightning_trak.gradients import (
    FunctionalEngine,
    GradientEngine,
    LoopEngine,
    ParameterSelection,
    select_parameters,
)
from lightning_trak.gradients.batch import fresh_batch, slice_batch
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections import Projection
from lightning_trak.projections.base import BoundProjection
from lightning_trak.store import Features

EngineName = Literal["auto", "functional", "loop"]

# Per-example gradients of a sub-batch may take this much memory; larger batches are cut.
GRADIENT_BYTES = 1 << 29


class FeatureExtractor:
    """Computes features on its own copy of the user's module, which itself is never touched.

    Args:
        module: the trained model.
        output: the scalar output to differentiate.
        checkpoints: the weights, one set per checkpoint.
        projection: what compresses gradients to k numbers.
        parameters: which parameters to differentiate, see :func:`~lightning_trak.gradients.select_parameters`.
        engine: ``"functional"`` (vmap), ``"loop"``, or ``"auto"``: vmap, and the loop for models that vmap cannot
            handle, with a warning that says why.
        seed: seed of the projection.
        dtype: dtype of the features.
        keep: keep the weights and projection of every checkpoint in memory, for going through all of them repeatedly.
    """

    def __init__(
        self,
        module: nn.Module,
        output: ModelOutput,
        checkpoints: Sequence[Checkpoint],
        projection: Projection,
        parameters: ParameterSelection = None,
        engine: EngineName = "auto",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        keep: bool = False,
    ) -> None:
        self.module = copy.deepcopy(module)
        for parameter in self.module.parameters():
            parameter.grad = None
        self.output = copy.deepcopy(output)
        self.checkpoints = checkpoints
        self.names = select_parameters(self.module, parameters)
        sizes = {name: parameter.numel() for name, parameter in self.module.named_parameters()}
        self.sizes = {name: sizes[raw] for name, raw in self.names.items()}
        self.projection = projection
        self.engine_name = engine
        self.seed = seed
        self.dtype = dtype
        self.current: int | None = None
        self._device = torch.device("cpu")
        self._engine: GradientEngine | None = None
        self._keep = keep
        self._loaded: dict[int, tuple[dict[str, Tensor], BoundProjection]] = {}

    def to_checkpoint(self, number: int, device: torch.device) -> None:
        """Load the weights of a checkpoint, and its projection.

        Raises:
            ValueError: if the weights do not fit the module.
        """
        checkpoint = self.checkpoints[number]
        with torch.inference_mode(False), torch.no_grad():
            if number not in self._loaded:
                if not self._keep:
                    self._loaded.clear()
                bound = self.projection.bind(self.sizes, seed=self.seed, checkpoint=number, device=device)
                self._loaded[number] = (checkpoint.load(), bound)
            weights, self._bound = self._loaded[number]
            try:
                self.module.load_state_dict(weights)
            except RuntimeError as error:
                raise ValueError(f"{checkpoint.name} does not fit {type(self.module).__name__}: {error}") from error
            self.module.eval()
        self.current, self._device = number, device

    def __call__(self, batch: Any, positions: Tensor) -> Features:
        """Features of a batch at the current checkpoint.

        Args:
            batch: a batch on the module's device.
            positions: what to call its examples in errors, shape ``(n,)``; its length is the number of examples.

        Raises:
            ValueError: if a feature is not finite.
        """
        size = len(positions)
        # Lightning predicts in inference mode, where nothing can be differentiated, and under autocast with mixed
        # precision, which vmap cannot always follow: gradients are taken in the precision of the weights.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            batch = fresh_batch(batch, size)
            row_bytes = sum(self.sizes.values()) * 4
            step = max(1, GRADIENT_BYTES // row_bytes)
            parts = [
                self._rows(slice_batch(batch, size, start, start + step), positions[start : start + step])
                for start in range(0, size, step)
            ]
            return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _rows(self, batch: Any, positions: Tensor) -> Features:
        outputs, gradients = self._differentiate(batch, len(positions))
        working = torch.promote_types(outputs.dtype, torch.float32)
        outputs = outputs.to(working)
        features = torch.zeros(len(positions), self._bound.dim, dtype=working, device=outputs.device)
        for name, gradient in gradients.items():
            self._bound.add_(features, name, gradient.to(working))
        features = features.to(self.dtype)
        self._check(features, outputs, positions)
        residuals, curvatures = self.output.derivatives(outputs)
        scalar = torch.promote_types(self.dtype, torch.float32)  # k numbers dwarf these three: no need to round them
        return Features(features, outputs.to(scalar), residuals.to(scalar), curvatures.to(scalar))

    def _differentiate(self, batch: Any, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        if self._engine is not None:
            return self._engine(batch, size)
        if self.engine_name == "loop":
            engine: GradientEngine = LoopEngine(self.module, self.output, self.names)
            result = engine(batch, size)
        else:
            engine = FunctionalEngine(self.module, self.output, self.names)
            try:
                result = engine(batch, size)
            except (RuntimeError, TypeError) as error:
                if self.engine_name == "functional":
                    raise
                engine = LoopEngine(self.module, self.output, self.names)
                result = engine(batch, size)  # if this fails too, the model is at fault: let it say so
                warnings.warn(
                    f"vmap cannot differentiate {type(self.module).__name__}, so each example is differentiated alone,"
                    f" which is slow (engine='loop' chooses this without the warning). vmap said: {error}",
                    stacklevel=2,
                )
        self._engine = engine
        return result

    def _check(self, features: Tensor, outputs: Tensor, positions: Tensor) -> None:
        bad = ~(features.isfinite().all(1) & outputs.isfinite())
        where = f"at checkpoint {self.current} ({self.checkpoints[self.current or 0].name})"
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"the feature of example {int(positions[first])} {where} is not finite (its output is"
                f" {float(outputs[first]):g}, features are {self.dtype}): look for NaN or huge values in this example"
                " or the weights, or use a dtype with a larger range; nothing of its shard was written"
            )

    def make_context(self, batches: Iterable[Any]) -> dict[str, Tensor]:
        """What the model output wants to remember of the data at this checkpoint."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return {name: tensor.clone() for name, tensor in self.output.make_context(self.module, batches).items()}
