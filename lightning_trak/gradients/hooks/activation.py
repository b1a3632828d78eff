"""Activations with parameters."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers import Layer


class PReLULayer(Layer, covers=[nn.PReLU]):
    """``nn.PReLU``, with one slope or one for each channel (dimension 1)."""

    @staticmethod
    def weight(module: nn.PReLU, activation: Tensor, gradient: Tensor, size: int) -> Tensor:
        """Shape ``(size, slopes)``: only negative inputs count."""
        slopes = gradient * activation.clamp(max=0)
        if module.num_parameters == 1:
            return slopes.reshape(size, -1).sum(1, keepdim=True)
        per_channel = slopes.reshape(size, -1, module.num_parameters, slopes[0, 0].numel())
        return per_channel.sum((1, 3))
