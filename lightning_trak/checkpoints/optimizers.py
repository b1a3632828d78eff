"""What a snapshot keeps of the optimizer."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_trak.checkpoints.names import canonical_name
from lightning_trak.checkpoints.series import ParameterGroup


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
