"""Features of models that FSDP2 shards over ranks. All ranks compute each batch together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_trak.checkpoints.names import canonical_name
from lightning_trak.compatibility import apply_to_tensors, set_device_mesh
from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.rows import Features
from lightning_trak.gradients import GradientEngine, HookEngine, ShardedHookEngine, coverage_report
from lightning_trak.gradients.audit import kinks
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.leaves import apart_from
from lightning_trak.outputs.base import close
from lightning_trak.packages import is_a, overrides
from lightning_trak.running.fsdp import reshard
from lightning_trak.running.ranks import Ranks
from lightning_trak.texts.messages import with_reasons

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ANOTHER_STRATEGY = "a Trainer with strategy='ddp' or a single device"
_OTHERWISE = f"use {ANOTHER_STRATEGY}"


class ShardedModelCopy(ModelCopy):
    """A copy of the user's module that shards itself in ``configure_model()``. :meth:`shard` calls it.

    Args:
        module: a LightningModule that makes its layers in ``__init__()``, and shards them in ``configure_model()``.
        args: as for :class:`~lightning_trak.features.model.ModelCopy`.
        kwargs: as for :class:`~lightning_trak.features.model.ModelCopy`.

    Raises:
        ValueError: if the module does not shard itself, or hooks do not cover all selected parameters.
    """

    sharded = True

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        name = type(module).__name__
        if not is_a(module, L.LightningModule) or not overrides(module, "configure_model", L.LightningModule):
            raise ValueError(
                f"with ModelParallelStrategy, a model must shard itself in LightningModule.configure_model(), but"
                f" {name} does not define it; define it, or {_OTHERWISE}"
            )
        if not any(True for _ in module.parameters()):
            raise ValueError(
                f"{name} has no parameters before configure_model(), but the store must know their shapes: make the"
                " layers in __init__() (on the meta device, if they are too large for one device) and only shard them"
                " in configure_model()"
            )
        saved = module.state_dict()
        lost = [key for key, buffer in module.named_buffers() if buffer.is_meta and key not in saved]
        if lost:
            raise ValueError(
                f"{name} has buffers on the meta device that are not persistent, so no checkpoint holds their content:"
                f" {', '.join(lost)}; make them on the CPU"
            )
        super().__init__(module, *args, **kwargs)
        self.module.eval()
        left_out = HookEngine.uncovered(self.module, self.names)
        if left_out:
            raise ValueError(
                f"gradients of a sharded model can only be computed by hooks, but"
                f" {coverage_report(left_out, self.sizes)}. Or {_OTHERWISE}"
            )
        self._shards = False

    def shard(self, mesh: DeviceMesh | None, device: torch.device) -> None:
        """Let the module shard itself, once the processes run. A second call does nothing.

        Args:
            mesh: the value of ``self.device_mesh`` in the module.
            device: the device for parameters that were made on the meta device.

        Raises:
            ValueError: if the names or shapes of parameters have changed afterwards.
        """
        if self._shards:
            return
        assert is_a(self.module, L.LightningModule)
        set_device_mesh(self.module, mesh)
        self.module.configure_model()
        own = {canonical_name(raw): (raw, parameter) for raw, parameter in self.module.named_parameters()}
        changed = [name for name, shape in self.shapes.items() if name not in own or own[name][1].shape != shape]
        if changed:
            raise ValueError(
                f"configure_model() of {type(self.module).__name__} has changed the parameters {', '.join(changed)}:"
                " make the layers in __init__() and only shard them in configure_model()"
            )
        self.names = {name: own[name][0] for name in self.names}
        for name, (_, parameter) in own.items():
            parameter.requires_grad_(name in self.names)
        if any(parameter.is_meta for _, parameter in own.values()):
            # Lightning would do this with all tensors. Buffers that no checkpoint holds would lose their content.
            def materialize(tensor: Tensor) -> Tensor:
                return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

            apply_to_tensors(self.module, materialize)
        self._shards = True


def sharded_engine(model: ModelCopy, examples: ExampleBatch, autocast: torch.dtype | None) -> ShardedHookEngine:
    """Make hooks for a sharded model, and check them against the gradients that FSDP2 computes.

    Args:
        model: the model copy, sharded and at a checkpoint.
        examples: examples on the model's device, the same on all ranks. At least two if batches hold more than one.
        autocast: dtype that forward passes are autocast to; None for no autocast.

    Raises:
        ValueError: if hooks do not give the right gradients of the sharded model.
    """
    try:
        reshard(model.module)
        with model.differentiable():
            engine = ShardedHookEngine(model.module, model.output, model.names, autocast)
            wrong = engine.check(examples)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"hooks fail on the sharded model, {_OTHERWISE}: {error}") from error
    if wrong:
        raise ValueError(f"hooks get some gradients of the sharded model wrong, {_OTHERWISE}: {with_reasons(wrong)}")
    return engine


@dataclass(frozen=True, eq=False)
class ShardedFeatureExtractor(FeatureExtractor):
    """Computes features by hooks on a sharded model.

    All ranks take part in every forward and backward pass, so they must run equally many batches at each checkpoint.
    """

    def __call__(self, batch: Any, positions: Tensor, audited: Mapping[int, Any] = MappingProxyType({})) -> Features:
        """Features of a batch, as :class:`FeatureExtractor` makes them. An error on one rank is raised on all ranks."""
        refusal = features = None
        try:
            features = super().__call__(batch, positions, audited)
        except EngineError as error:
            refusal = error
        world = _world()
        if not world.all_true(refusal is None):
            reasons = [reason for reason in world.gather(refusal and str(refusal)) if reason]
            raise EngineError(reasons[0]) from refusal
        assert features is not None
        return features

    def one(self, twice: Any, position: int) -> tuple[Tensor, Tensor]:
        """Make the feature of one example alone. In the same call all ranks compare their hooks with FSDP2.

        Args:
            twice: a batch on the module's device that holds the example twice. Each rank may have another example.
            position: the number of the example in errors.

        Returns:
            The features of its ``projection.sketch``, shape ``(1, sketch.dim)``, and its output, shape ``(1,)``.

        Raises:
            ValueError: on all ranks, if hooks do not give the right gradients.
        """
        assert isinstance(self.engine, ShardedHookEngine)
        single = ExampleBatch(twice, 2, self.layout).take([0])
        with self.model.differentiable():
            with apart_from(self.model.original, self.model.module):
                wrong = self.engine.check(single)
            if wrong:
                numbers = ", ".join(map(str, sorted(set(_world().gather(position)))))
                raise ValueError(
                    f"one of the examples {numbers} {self.model.place}: hooks get some gradients of the"
                    f" sharded model wrong, {_OTHERWISE}: {with_reasons(wrong)}"
                )
            return self._project(self.engine, single, self.projection.sketch)

    def _audit(
        self,
        engine: GradientEngine,
        batch: ExampleBatch,
        sketches: Tensor,
        outputs: Tensor,
        audited: Mapping[int, tuple[Tensor, Tensor]],
        names: Mapping[int, str],
    ) -> None:
        """Compare with the features from :meth:`one`, because no rank can differentiate alone.

        Raises:
            EngineError: if the feature or output of an example differs between its batch and alone.
        """
        del batch
        rounding = engine.rounding
        for number, (sketch, output) in audited.items():
            if not (output.isfinite() and sketches[number].isfinite().all()):
                continue  # another check refuses features that are not finite
            if not close(outputs[number : number + 1], output, rounding):
                raise EngineError(
                    f"{names[number]}: its output is {float(outputs[number]):.6g} in its batch and {float(output):.6g}"
                    " alone: it depends on the rest of the batch, for example through padding that is not masked, or it"
                    " differs each time"
                )
            off, norm = float((sketches[number] - sketch[0]).norm()), float(sketch.norm())
            noise = 1e-2 * rounding * float(sketches.norm(dim=1).nan_to_num(0, 0, 0).max())
            if off > kinks(engine.precision) * norm + noise:
                raise EngineError(
                    f"{names[number]}: its gradient in its batch is off by {off / norm:.2g} of its norm, compared with"
                    " the example alone"
                )


def _world() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size())
