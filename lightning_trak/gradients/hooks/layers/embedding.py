"""Embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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

    def projected_gradient(
        self,
        parameter: str,
        call: LayerCall,
        left: Tensor,
        right: Tensor,
    ) -> Tensor:
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
