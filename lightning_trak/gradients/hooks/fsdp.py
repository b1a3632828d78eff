"""Hooks on a model that FSDP2 shards over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.engine import HookEngine, Shapes
from lightning_trak.gradients.hooks.hooked_pass import Receive
from lightning_trak.gradients.hooks.layers import LayerCall
from lightning_trak.gradients.hooks.sketch import Sketches
from lightning_trak.gradients.hooks.tracked_module import TrackedModule
from lightning_trak.outputs.evaluating import exact_attention
from lightning_trak.running.fsdp import mean_over_ranks


class ShardedHookEngine(HookEngine):
    """A :class:`HookEngine` for models that FSDP2 shards.

    Inputs and output gradients of layers are not sharded. Hooks use only these, so sharded parameters need no
    gradients.

    Each forward and each backward pass gathers parameters from all ranks. So all ranks must call each method equally
    often, and the very first pass must have the same examples on all ranks. Set ``requires_grad`` of the parameters
    before the first forward pass, since FSDP2 copies it then.

    FSDP2 averages gradients over ranks. So :meth:`check` averages the gradients by hooks over ranks, too, and compares
    the averages. All ranks must have the same number of examples. The result is the same on all ranks.

    Args:
        module: the model.
        output: the scalar output that is differentiated.
        names: canonical parameter name -> name in ``module``. Only these parameters are differentiated.

    Raises:
        ValueError: if no layer class covers a parameter's module.
    """

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The context of forward passes. It does not restore attributes of the module, since FSDP2 changes them."""
        with exact_attention(), torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            yield

    def _shapes(self, batch: ExampleBatch) -> Shapes:
        """One key for all batches. Shared outputs are found once, in the first :meth:`check`, on the same examples."""
        return ()

    def _outside_parameters(self) -> list[nn.Parameter]:
        return []

    @contextmanager
    def _frozen_inside(self) -> Iterator[None]:
        yield

    def _differentiating(self, parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
        return nullcontext()

    def _on_any_rank(self, needed: bool) -> bool:
        flag = torch.tensor(int(needed), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def backward(self, batch: ExampleBatch, receive: Receive) -> Tensor:
        """See :meth:`HookEngine.backward`."""

        def receive_in_precision_of_weights(tracked: TrackedModule, call: LayerCall) -> None:
            used = call.output_gradient.dtype
            for name in tracked.parameters.values():
                weights = self.parameters[name].dtype
                if used != weights and self.autocast is None:
                    raise ValueError(
                        f"{name} has {weights} weights and is used in {used}, but features are computed in the"
                        " precision of the weights: leave param_dtype out of fully_shard's MixedPrecisionPolicy"
                    )
            receive(tracked, call)

        return super().backward(batch, receive_in_precision_of_weights)

    def _pairs(self, batch: ExampleBatch) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = super()._pairs(batch)
        return {name: (mean_over_ranks(found.clone()), expected) for name, (found, expected) in pairs.items()}

    def _differentiate(self, batch: ExampleBatch, sketches: Sketches, rows: Tensor) -> None:
        """As in :class:`HookEngine`. FSDP2 leaves each rank a shard; one whole gradient at a time is gathered."""
        with self._eager():
            for number, row in enumerate(torch.split(rows, 1)):
                self.outputs(batch)[number].backward()  # type: ignore[no-untyped-call]
                for name, parameter in self.parameters.items():
                    gradient, parameter.grad = parameter.grad, None
                    whole = torch.zeros_like(parameter) if gradient is None else gradient
                    sketches.add_(row, name, mean_over_ranks(whole).reshape(1, -1))
