"""Embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.compatibility import replaced_parameter
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.hooks.layers.base import Layer, LayerCall


class EmbeddingLayer(Layer, covers=[nn.Embedding]):
    """``nn.Embedding``, with or without a padding index."""

    module: nn.Embedding
    parameter_names = ("weight",)

    def refusal(self) -> str | None:
        """``max_norm`` and ``scale_grad_by_freq`` are refused: weights change, or gradients are replaced."""
        if self.module.max_norm is not None:
            return "max_norm changes the weights in every forward"
        if self.module.scale_grad_by_freq:
            return "scale_grad_by_freq replaces the gradient"
        return None

    def gradient(self, parameter: str, call: LayerCall) -> Tensor:
        """Shape ``(size, ids * width)``. Each position's gradient is added to the row of its id."""
        gradients, ids = self._positions(call)
        count = self.module.num_embeddings
        offsets = torch.arange(call.size, device=ids.device).unsqueeze(1) * count
        rows = gradients.new_zeros(call.size * count, gradients.shape[-1])
        rows.index_add_(0, (ids + offsets).flatten(), gradients.flatten(0, 1))
        return rows.view(call.size, -1)

    def nonzero_rows(self, parameter: str, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Shapes ``(size, positions, width)`` and ``(size, positions)``."""
        return self._positions(call)

    def projected_gradient(self, parameter: str, call: LayerCall, left: Tensor, right: Tensor) -> Tensor:
        """Shape ``(size, l, r)``. The row of an id in G is multiplied by the same row of ``left``."""
        gradients, ids = self._positions(call)
        return left[ids].transpose(1, 2) @ (gradients @ right)

    def _positions(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Gradients, ``(size, positions, width)``, with zeros for padding, and ids, ``(size, positions)``."""
        ids = call.inputs.reshape(call.size, -1)
        gradients = call.output_gradient.reshape(*ids.shape, -1)
        if self.module.padding_idx is not None:
            gradients = gradients * (ids != self.module.padding_idx).unsqueeze(-1)
        return gradients, ids


class ScaledEmbeddingLayer(EmbeddingLayer, covers_by_structure=True):
    """A type derived from ``nn.Embedding`` that multiplies the rows, as Gemma and BART do.

    The factors are the output for a weight of ones. Each time, the output for the own weight must be their product.
    """

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """Whether the module is an embedding with one parameter and a forward of one argument."""
        return _derived(module) and len(inspect.signature(module.forward).parameters) == 1

    def _positions(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        own = self.module.weight.detach()
        with torch.no_grad():
            outputs = self.module.forward(call.inputs)
            with replaced_parameter(self.module, "weight", own.new_ones(1, 1).expand_as(own)):
                factors = self.module.forward(call.inputs)
            plain = F.embedding(call.inputs, own)
        if not outputs.shape == factors.shape == plain.shape or not torch.allclose(outputs, factors * plain, rtol=1e-2):
            raise EngineError(f"{type(self.module).__name__} does not multiply the rows of its weight by factors")
        return super()._positions(LayerCall(call.inputs, call.output_gradient * factors, call.size))


class LookupEmbeddingLayer(EmbeddingLayer, covers_by_structure=True):
    """A type derived from ``nn.Embedding`` with a forward of several arguments, which picks rows of the weight by them.

    Examples are the embeddings of positions of BART, OPT and Whisper. The output for a weight whose rows hold their own
    numbers says which rows were picked.
    """

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """Whether the module is an embedding with one parameter and a forward of several arguments."""
        return _derived(module) and len(inspect.signature(module.forward).parameters) > 1

    def inputs_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The ids of the rows, in the shape of the output without its last dimension.

        Raises:
            EngineError: if the output is anything else than rows of the weight.
        """
        count, device = self.module.num_embeddings, self.module.weight.device
        numbers = torch.arange(count, dtype=torch.float64, device=device)
        # A second column shows whether rows are changed: it holds the numbers in the opposite order.
        with torch.no_grad(), replaced_parameter(self.module, "weight", torch.stack([numbers, numbers.flip(0)], 1)):
            found = self.module.forward(*args, **kwargs)
        if not isinstance(found, Tensor) or not found.shape[-1:] == (2,):
            raise EngineError(f"{type(self.module).__name__} returns more than rows of its weight")
        ids = found[..., 0].long().clamp(0, count - 1)
        if not torch.equal(found, torch.stack([ids, count - 1 - ids], -1).to(found.dtype)):
            raise EngineError(f"{type(self.module).__name__} changes the rows of its weight")
        return ids


def _derived(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and [name for name, _ in module.named_parameters()] == ["weight"]
