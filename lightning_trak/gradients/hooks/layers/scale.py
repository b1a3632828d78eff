"""Modules of any type with an output that is affine in one vector, such as RMS normalisations of language models."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from lightning_trak.compatibility import replaced_parameter
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.hooks.layers.base import Layer, LayerCall


class ScaleLayer(Layer, covers_by_structure=True):
    """A module of a type that no other class covers. Its output is affine in its only weight, a vector.

    The vector belongs to the last dimension. Examples are the RMS normalisations of Llama, Qwen, Gemma, T5 and others:
    some multiply by ``weight``, some by ``1 + weight``. The slope is the output for a weight of ones minus the output
    for a weight of zeros. Each time, a third weight checks that the output is affine in the weight.
    """

    parameter_names = ("weight",)

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """Whether the module has one vector as ``weight``, no submodules, and a forward of one argument."""
        parameters = dict(module.named_parameters(recurse=False))
        if list(parameters) != ["weight"] or parameters["weight"].ndim != 1 or any(True for _ in module.children()):
            return False
        arguments = list(inspect.signature(module.forward).parameters.values())
        return len(arguments) == 1 and arguments[0].kind in (
            arguments[0].POSITIONAL_OR_KEYWORD,
            arguments[0].POSITIONAL_ONLY,
        )

    def gradient(self, parameter: str, call: LayerCall) -> Tensor:
        """Shape ``(size, numel)``.

        Raises:
            EngineError: if the output is not affine in the weight.
        """
        name = type(self.module).__name__
        own = self.module.get_parameter("weight").detach()
        other = torch.linspace(0.5, 1.5, len(own), dtype=own.dtype, device=own.device)
        with torch.no_grad():
            at_zero, at_one, at_other = (
                self._output(weight, call.inputs) for weight in (torch.zeros_like(own), torch.ones_like(own), other)
            )
            if at_one.shape != call.output_gradient.shape or at_one.shape[-1:] != own.shape:
                raise EngineError(f"{name} does not scale its last dimension by its weight")
            slope = at_one - at_zero
            error = (at_other - at_zero - other * slope).abs().max()
        if error > 1e-2 * slope.abs().max():
            raise EngineError(f"{name} is not affine in its weight")
        return (call.output_gradient * slope).reshape(call.size, -1, own.numel()).sum(1)

    def _output(self, weight: Tensor, inputs: Tensor) -> Tensor:
        """The module's output for another weight, without the hooks on the module."""
        with replaced_parameter(self.module, "weight", weight):
            output: Tensor = self.module.forward(inputs)
        return output
