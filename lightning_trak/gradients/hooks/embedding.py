"""Embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers import Layer


class EmbeddingLayer(Layer, covers=[nn.Embedding]):
    """``nn.Embedding``, with or without a padding index."""

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        """Renormalising changes the weights in every forward, and scaling by frequency is no gradient."""
        if module.max_norm is not None:
            return "max_norm changes the weights in every forward"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq replaces the gradient"
        return None

    @staticmethod
    def weight(module: Any, activation: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Shape ``(size * ids, width)``: each position's gradient is added to the row of its id."""
        ids, gradient = _positions(module, activation, gradient, size)
        width = gradient.shape[-1]
        offsets = torch.arange(size, device=ids.device).unsqueeze(1) * module.num_embeddings
        rows = gradient.new_zeros(size * module.num_embeddings, width)
        rows.index_add_(0, (ids + offsets).flatten(), gradient.flatten(0, 1))
        return rows.view(size, -1)

    @staticmethod
    def sparse_weight(module: Any, activation: Tensor, gradient: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Shapes ``(size, positions, width)`` and ``(size, positions)``."""
        ids, gradient = _positions(module, activation, gradient, size)
        return gradient, ids

    @staticmethod
    def project_weight(
        module: Any, activation: Tensor, gradient: Tensor, size: int, left: Tensor, right: Tensor
    ) -> Tensor:
        """Shape ``(size, l, r)``: an id stands for the vector that picks its row, so it picks a row of ``left``."""
        ids, gradient = _positions(module, activation, gradient, size)
        return left[ids].transpose(1, 2) @ (gradient @ right)


def _positions(module: Any, activation: Tensor, gradient: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Ids, ``(size, positions)``, and gradients, ``(size, positions, width)``, which padding does not get."""
    ids = activation.reshape(size, -1)
    gradient = gradient.reshape(*ids.shape, -1)
    if module.padding_idx is not None:
        gradient = gradient * (ids != module.padding_idx).unsqueeze(-1)
    return ids, gradient
