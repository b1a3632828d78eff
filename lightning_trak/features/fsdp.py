"""Features of models that FSDP2 splits over ranks, made by all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_trak.checkpoints.copies import copy_module
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
from lightning_trak.running.fsdp import reshard
from lightning_trak.running.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

ANOTHER_STRATEGY = "a Trainer with strategy='ddp' or a single device"
_OTHERWISE = f"use {ANOTHER_STRATEGY}"


class ShardedModelCopy(ModelCopy):
    """A copy of the user's module that its ``configure_model()`` shards, once the processes run: :meth:`shard`.

    Args:
        module: a LightningModule that has its layers once it is constructed, and shards them in ``configure_model()``.
        args: as for :class:`~lightning_trak.features.model.ModelCopy`.
        kwargs: as for :class:`~lightning_trak.features.model.ModelCopy`.

    Raises:
        ValueError: if the module does not shard itself, or hooks do not cover all selected parameters.
    """

    sharded = True

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        name = type(module).__name__
        if not isinstance(module, L.LightningModule) or not is_overridden("configure_model", module):
            raise ValueError(
                f"ModelParallelStrategy has models shard themselves in LightningModule.configure_model(), which {name}"
                f" does not define; {_OTHERWISE}"
            )
        if not any(True for _ in module.parameters()):
            raise ValueError(
                f"{name} has no parameters before configure_model(), and the store must know their shapes: make the"
                " layers in __init__() (on the meta device, if they are too large for one) and only shard them in"
                " configure_model()"
            )
        saved = module.state_dict()
        lost = [key for key, buffer in module.named_buffers() if buffer.is_meta and key not in saved]
        if lost:
            raise ValueError(
                f"{name} has buffers on the meta device, {', '.join(lost)}, that no checkpoint gives a content, since"
                " they are not persistent: make them on the CPU"
            )
        super().__init__(module, *args, **kwargs)
        self.module.eval()
        left_out = HookEngine.uncovered(self.module, self.names)
        if left_out:
            raise ValueError(
                f"gradients of a sharded model are taken by hooks alone, and {coverage_report(left_out, self.sizes)}."
                f" Or {_OTHERWISE}"
            )
        self._shards = False

    @staticmethod
    def _copy(module: nn.Module) -> nn.Module:
        return copy_module(module, configure=False)

    def shard(self, mesh: DeviceMesh | None, device: torch.device) -> None:
        """Have the module shard itself, once the processes run; does nothing the second time.

        Args:
            mesh: what the module finds as ``self.device_mesh``.
            device: where parameters go that were made on the meta device.

        Raises:
            ValueError: if parameters are others afterwards.
        """
        if self._shards:
            return
        assert isinstance(self.module, L.LightningModule)
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
            # Lightning would do this too, but to everything: buffers that no checkpoint holds would lose their content.
            def materialize(tensor: Tensor) -> Tensor:
                return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor

            apply_to_tensors(self.module, materialize)
        self._shards = True


def sharded_engine(model: ModelCopy, examples: ExampleBatch, autocast: torch.dtype | None = None) -> ShardedHookEngine:
    """Make hooks for a sharded model, and check them against the gradients that FSDP2 makes.

    Args:
        model: at a checkpoint, after it has been sharded.
        examples: on the model's device, the same on all ranks; at least two if batches will hold more than one.
        autocast: what forward passes are autocast to, if anything.

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
        reasons = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
        raise ValueError(f"hooks get some gradients of the sharded model wrong, {_OTHERWISE}: {reasons}")
    return engine


@dataclass(frozen=True, eq=False)
class ShardedFeatureExtractor(FeatureExtractor):
    """Computes features by hooks on a sharded model.

    Every forward and backward pass is one of all ranks: they must run equally many batches at each checkpoint.
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
        """Make the feature of one example alone. All ranks compare their hooks with FSDP2 in the same call.

        Args:
            twice: a batch of twice the example, on the module's device. Ranks may have other examples.
            position: what to call it in errors.

        Returns:
            Its feature, shape ``(1, k)``, and its output, shape ``(1,)``.

        Raises:
            ValueError: on all ranks, if hooks do not give the right gradients.
        """
        assert isinstance(self.engine, ShardedHookEngine)
        single = ExampleBatch(twice, 2, self.layout).take([0])
        with self.model.differentiable():
            with apart_from(self.model.original, self.model.module):
                wrong = self.engine.check(single)
            if wrong:
                reasons = "; ".join(f"{name}: {reason}" for name, reason in wrong.items())
                numbers = ", ".join(map(str, sorted(set(_world().gather(position)))))
                raise ValueError(
                    f"one of the examples {numbers} {self.model.place}: hooks get some gradients of the"
                    f" sharded model wrong, {_OTHERWISE}: {reasons}"
                )
            return self._project(self.engine, single)

    def _audit(
        self,
        engine: GradientEngine,
        batch: ExampleBatch,
        features: Tensor,
        outputs: Tensor,
        audited: Mapping[int, tuple[Tensor, Tensor]],
        names: Mapping[int, str],
    ) -> None:
        """Compare with the features that :meth:`one` has made, since no rank can differentiate alone.

        Raises:
            EngineError: if the feature or output of an example differs between its batch and alone.
        """
        del batch
        rounding = engine.rounding
        for number, (feature, output) in audited.items():
            if not (output.isfinite() and features[number].isfinite().all()):
                continue  # what is not finite is refused with its own name
            if not close(outputs[number : number + 1], output, rounding):
                raise EngineError(
                    f"{names[number]}: its output is {float(outputs[number]):.6g} in its batch and {float(output):.6g}"
                    " alone: it depends on the rest of the batch, as through padding that is not masked, or is another"
                    " one each time"
                )
            off, norm = float((features[number] - feature[0]).norm()), float(feature.norm())
            noise = 1e-2 * rounding * float(features.norm(dim=1).nan_to_num(0, 0, 0).max())
            if off > kinks(engine.precision) * norm + noise:
                raise EngineError(f"{names[number]}: its gradient is off by {off / norm:.2g} of its norm in its batch")


def _world() -> Ranks:
    return Ranks(dist.get_rank(), dist.get_world_size())
