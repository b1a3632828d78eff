"""The steps of Adam and AdamW."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_trak.replay.optimizers.base import Moments, OptimizerStep


class AdamStep(OptimizerStep, optimizer=torch.optim.Adam):
    """Adam, with AMSGrad if it is chosen, as ``torch.optim.Adam`` documents it.

    With ``eps_root`` among the hyperparameters the step is m / (sqrt(v + eps_root) + eps), with m and v the moments
    corrected for their bias.
    """

    moments = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    elementwise = True
    decoupled = False

    @override
    def update(
        self, parameter: Tensor, gradient: Tensor, kept: Moments, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if group["maximize"]:
            gradient = -gradient
        decay = group["weight_decay"]
        if self.decoupled or group.get("decoupled_weight_decay", False):
            parameter = parameter * (1 - group["lr"] * decay)
        elif decay:
            gradient = torch.add(gradient, parameter, alpha=decay)
        first, second = group["betas"]
        step = float(kept["step"]) + 1 if "step" in kept else 1.0
        zero = torch.zeros_like(gradient)
        average = first * kept.get("exp_avg", zero) + (1 - first) * gradient
        square = second * kept.get("exp_avg_sq", zero) + (1 - second) * gradient * gradient
        after = {"exp_avg": average, "exp_avg_sq": square}
        largest = square
        if group["amsgrad"]:
            largest = after["max_exp_avg_sq"] = torch.maximum(kept.get("max_exp_avg_sq", zero), square)
        scale = largest / (1 - second**step) + group.get("eps_root", 0.0)
        step_size = group["lr"] / (1 - first**step)
        return parameter - step_size * average / (_root(scale) + group["eps"]), after


class AdamWStep(AdamStep, optimizer=torch.optim.AdamW):
    """AdamW, as ``torch.optim.AdamW`` documents it."""

    decoupled = True


def _root(square: Tensor) -> Tensor:
    """The square root, with a derivative of zero at zero.

    A weight whose gradients were all zero has v = 0 and m = 0. The derivative of m / (sqrt(v) + eps) by v is then a
    product with m, which is zero, but autograd would give zero times infinity.
    """
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, torch.ones_like(square)).sqrt(), 0.0)
