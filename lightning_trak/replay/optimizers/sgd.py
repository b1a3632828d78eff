"""The step of SGD."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_trak.replay.optimizers.base import Moments, OptimizerStep


class SGDStep(OptimizerStep, optimizer=torch.optim.SGD):
    """SGD with momentum, dampening, Nesterov momentum and weight decay, as ``torch.optim.SGD`` documents it."""

    moments = ("momentum_buffer",)

    @override
    def update(
        self, parameter: Tensor, gradient: Tensor, kept: Moments, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        direction = -gradient if group["maximize"] else gradient
        direction = direction + group["weight_decay"] * parameter
        momentum = group["momentum"]
        if not momentum:
            return parameter - group["lr"] * direction, {}
        buffer = kept.get("momentum_buffer")
        buffer = direction if buffer is None else momentum * buffer + (1 - group["dampening"]) * direction
        direction = direction + momentum * buffer if group["nesterov"] else buffer
        return parameter - group["lr"] * direction, {"momentum_buffer": buffer}
