"""Hooks on a model that FSDP2 splits over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.coverage import Site
from lightning_trak.gradients.hooks.engine import HookEngine, Shapes
from lightning_trak.gradients.sharding import shard_like
from lightning_trak.outputs.evaluating import exact_attention


class ShardedHookEngine(HookEngine):
    """Hooks see inputs and output gradients, which are whole, so that sharded parameters need no gradients.

    Each forward and each backward pass gathers parameters from all ranks: they must call everything here equally often,
    :meth:`check` and the very first pass with the same examples. ``requires_grad`` of the parameters must be set before
    the first forward pass, as FSDP2 copies it then.

    Args:
        module: the model.
        output: the scalar output that is differentiated.
        names: canonical parameter name -> name in ``module``; only these are differentiated.

    Raises:
        ValueError: if a parameter's module is not covered.
    """

    # Each rank's shapes are its own, and a second backward pass on some ranks alone would wait for the others for ever.
    proves_ownership: ClassVar[bool] = False

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """FSDP2 itself changes the module's attributes in a forward pass, so they are left as they become."""
        device = next(iter(self.parameters.values())).device.type
        with exact_attention(), torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            yield

    def _shapes(self, batch: ExampleBatch) -> Shapes:  # noqa: ARG002
        """Anything: layouts are found once, in :meth:`check`, when all ranks have the same examples."""
        return ()

    def _outside(self) -> list[nn.Parameter]:
        return []

    @contextmanager
    def _frozen_inside(self) -> Iterator[None]:
        yield

    @contextmanager
    def _differentiating(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:  # noqa: ARG002
        yield

    def _pairs(self, batch: ExampleBatch) -> dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]]:
        """A rank holds its part of the gradients alone, and of one parameter the whole; the reference is FSDP2's own.

        Raises:
            ValueError: if FSDP2 computes in another precision than that of the weights.
        """
        rows: dict[str, list[Tensor]] = {}

        def collect(site: Site, activation: Tensor, gradient: Tensor) -> None:
            for attribute, name in site.parameters.items():
                like = self.parameters[name]
                if gradient.dtype != like.dtype and self.autocast is None:
                    raise ValueError(
                        f"{name} has {like.dtype} weights and is used in {gradient.dtype}; features are computed in the"
                        " precision of the weights: leave param_dtype out of fully_shard's MixedPrecisionPolicy"
                    )
                parts = getattr(site.layer, attribute)(site.module, activation, gradient, batch.size)
                own = [shard_like(part, like) for part in parts.reshape(batch.size, *like.shape)]
                rows[name] = [a + b for a, b in zip(rows[name], own, strict=True)] if name in rows else own

        self._backward(batch, collect)
        expected: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        with self._eager():
            for position in range(batch.size):
                self.outputs(batch)[position].backward()  # type: ignore[no-untyped-call]
                for name, parameter in self.parameters.items():
                    gradient, parameter.grad = parameter.grad, None
                    expected[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
        nothing = {name: [torch.zeros_like(one) for one in parts] for name, parts in expected.items()}
        return {name: (rows.get(name, nothing[name]), parts) for name, parts in expected.items()}
