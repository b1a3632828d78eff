"""What a snapshot keeps of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from lightning_trak.checkpoints.manifest import ParameterGroup
from lightning_trak.checkpoints.names import canonical_name


def parameter_groups(position: int, optimizer: Optimizer, module: nn.Module) -> list[ParameterGroup]:
    """The settings of an optimizer's parameter groups.

    Args:
        position: the number of the optimizer.
        optimizer: the optimizer.
        module: the module that is trained. It gives parameters their names.

    Raises:
        ValueError: if a learning rate or weight decay is not finite.
    """
    names = {id(parameter): canonical_name(name) for name, parameter in module.named_parameters()}

    def number(group: dict[str, Any], key: str) -> float | None:
        value = None if group.get(key) is None else float(group[key])
        if value is not None and not math.isfinite(value):
            raise ValueError(
                f"optimizer {position} ({type(optimizer).__name__}) has {key}={value}, which cannot train a model;"
                " use a finite number"
            )
        return value

    return [
        ParameterGroup(
            position,
            type(optimizer).__name__,
            number(group, "lr"),
            number(group, "weight_decay"),
            tuple(names[id(parameter)] for parameter in group["params"] if id(parameter) in names),
        )
        for group in optimizer.param_groups
    ]


def require_adam(optimizers: Sequence[Optimizer]) -> None:
    """Check that :func:`preconditioner_of` knows these optimizers.

    Raises:
        TypeError: if one is not Adam or AdamW of torch.
    """
    for optimizer in optimizers:
        if type(optimizer) not in (Adam, AdamW):
            raise TypeError(
                f"preconditioner=True needs torch.optim.Adam or AdamW, got {type(optimizer).__module__}."
                f"{type(optimizer).__name__}: use one of these, or leave it out"
            )


@torch.no_grad()
def preconditioner_of(optimizers: Sequence[Optimizer], module: nn.Module) -> dict[str, Tensor]:
    r"""What Adam multiplies each element of a gradient by, beside the learning rate.

    It is :math:`1 / (\sqrt{\hat v} + \epsilon)` with the second moment :math:`\hat v` of the last step, corrected for
    its bias (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; with ``amsgrad`` the largest one so far). An element
    that has had no gradient yet, whose second moment is zero, has the number 0 here. A parameter that has had none is
    left out.

    Args:
        optimizers: Adam or AdamW of torch.
        module: the module that is trained. It gives parameters their names.

    Returns:
        Canonical name -> float32 tensor on the CPU, or float64 for parameters in float64, of the parameter's shape.

    Raises:
        TypeError: if a parameter is complex.
        ValueError: if several optimizers train a parameter.
    """
    names = {id(parameter): canonical_name(name) for name, parameter in module.named_parameters()}
    found: dict[str, Tensor] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state, name = optimizer.state.get(parameter), names.get(id(parameter))
                if not state or name is None:
                    continue
                if name in found:
                    raise ValueError(f"several optimizers train {name}: its preconditioner is not one of them alone")
                if parameter.is_complex():
                    raise TypeError(f"preconditioner=True needs real parameters, but {name} is complex")
                moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
                moment = moment.to("cpu", torch.promote_types(moment.dtype, torch.float32))
                corrected = moment / (1 - float(group["betas"][1]) ** float(state["step"]))
                found[name] = torch.where(moment > 0, 1 / (corrected.sqrt() + float(group["eps"])), 0.0)
    return found
