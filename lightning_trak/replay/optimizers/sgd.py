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
    elementwise = linear = True

    @override
    def update(
        self, parameter: Tensor, gradient: Tensor, kept: Moments, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Scales are arguments of torch.add, and absent terms are left out: for many targets each takes much time.
        direction = -gradient if group["maximize"] else gradient
        if group["weight_decay"]:
            direction = torch.add(direction, parameter, alpha=group["weight_decay"])
        momentum = group["momentum"]
        if not momentum:
            return torch.add(parameter, direction, alpha=-group["lr"]), {}
        buffer = kept.get("momentum_buffer")
        buffer = direction if buffer is None else torch.add(momentum * buffer, direction, alpha=1 - group["dampening"])
        direction = torch.add(direction, buffer, alpha=momentum) if group["nesterov"] else buffer
        return torch.add(parameter, direction, alpha=-group["lr"]), {"momentum_buffer": buffer}
