"""Activations with parameters."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers.base import Layer, LayerCall


class PReLULayer(Layer, covers=[nn.PReLU]):
    """``nn.PReLU``, with one slope or one for each channel (dimension 1)."""

    module: nn.PReLU
    parameter_names = ("weight",)

    def gradient(self, parameter: str, call: LayerCall) -> Tensor:
        """Shape ``(size, slopes)``: only negative inputs count."""
        products = call.output_gradient * call.inputs.clamp(max=0)
        slopes = self.module.num_parameters
        if slopes == 1:
            return products.reshape(call.size, -1).sum(1, keepdim=True)
        return products.reshape(call.size, -1, slopes, products[0, 0].numel()).sum((1, 3))
