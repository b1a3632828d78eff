"""Hooks on a model that FSDP2 splits over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients.hooks.coverage import Site
from lightning_trak.gradients.hooks.engine import HookEngine
from lightning_trak.gradients.sharding import shard_like


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

    def _frozen(self) -> AbstractContextManager[None]:
        return nullcontext()

    def _pairs(self, batch: Any, size: int) -> dict[str, tuple[Sequence[Tensor], Sequence[Tensor]]]:
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
                parts = getattr(site.layer, attribute)(site.module, activation, gradient, size)
                own = [shard_like(part, like) for part in parts.reshape(size, *like.shape)]
                rows[name] = [a + b for a, b in zip(rows[name], own, strict=True)] if name in rows else own

        self._backward(batch, size, collect)
        expected: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        with self._eager(), torch.enable_grad():
            for position in range(size):
                self._outputs(batch)[position].backward()  # type: ignore[no-untyped-call]
                for name, parameter in self.parameters.items():
                    gradient, parameter.grad = parameter.grad, None
                    expected[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
        nothing = {name: [torch.zeros_like(one) for one in parts] for name, parts in expected.items()}
        return {name: (rows.get(name, nothing[name]), parts) for name, parts in expected.items()}
