"""The step of Muon."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_trak.compatibility import muon_orthogonalized
from lightning_trak.replay.optimizers.base import Moments, OptimizerStep

_ORTHOGONALIZED = 0.2  # other hardware may round otherwise in bfloat16, and the iterations amplify it


class MuonStep(OptimizerStep, optimizer=getattr(torch.optim, "Muon", None)):
    """Muon, as ``torch.optim.Muon`` documents it (Jordan et al. 2024).

    torch orthogonalizes in bfloat16. The step is torch's, with its rounding. A function that is rounded has no
    derivative, so that of the same function without the rounding is taken.
    """

    moments = ("momentum_buffer",)
    rounding = _ORTHOGONALIZED

    @override
    def update(
        self, parameter: Tensor, gradient: Tensor, kept: Moments, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        momentum = group["momentum"]
        buffer = kept.get("momentum_buffer", torch.zeros_like(gradient))
        buffer = momentum * buffer + (1 - momentum) * gradient
        update = (1 - momentum) * gradient + momentum * buffer if group["nesterov"] else buffer
        options = group["ns_coefficients"], group["ns_steps"], group["eps"]
        smooth = _orthogonalized(update, *options)
        with torch.no_grad():
            rounding = muon_orthogonalized(update, *options) - smooth
        update = smooth + rounding
        lr = group["lr"]
        rows, columns = parameter.shape
        adjusted = {
            "original": math.sqrt(max(1, rows / columns)),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        }.get(group["adjust_lr_fn"] or "original", 1.0)
        return parameter * (1 - lr * group["weight_decay"]) - lr * adjusted * update, {"momentum_buffer": buffer}


def _orthogonalized(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Newton-Schulz iterations towards the orthogonal factor of a matrix."""
    tall = matrix.size(0) > matrix.size(1)
    found = matrix.T if tall else matrix
    found = found / found.norm().clamp(min=eps)
    linear, cubic, quintic = coefficients
    for _ in range(steps):
        gram = found @ found.T
        found = linear * found + (cubic * gram + quintic * gram @ gram) @ found
    result: Tensor = found.T if tall else found
    return result
