"""The outputs of a module in a recorded run at targets, each of them alone and in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, unchanged
from lightning_trak.replay.player import Player


@contextmanager
def differentiable(player: Player) -> Iterator[None]:
    """Compute so that all operations can be differentiated twice."""
    with (
        player.computing(),
        exact_attention(),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
        ExitStack() as stack,
    ):
        if any(isinstance(part, nn.RNNBase) for part in player.module.modules()):
            stack.enter_context(cudnn.flags(enabled=False))
        yield


def output_at(module: nn.Module, output: ModelOutput, batch: Any, number: int) -> Tensor:
    """The output at one target.

    Args:
        module: a module in eval mode.
        output: the output.
        batch: the target alone, as a batch. It is not changed.
        number: the position of the target in its dataset.

    Returns:
        Shape ``(1,)``, with its graph.

    Raises:
        ValueError: if the output is not one finite number.
    """
    with unchanged(module, output):
        values = output.output(module, copy.deepcopy(batch))
    if not isinstance(values, Tensor) or values.shape != (1,):
        received = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{type(output).__name__}.output returned {received} for target {number} alone; expected one number per"
            " example, shape (1,)"
        )
    if not values.isfinite().all():
        raise ValueError(
            f"the output at target {number} is {float(values):g}; leave the target out, or look for NaN in it and in"
            " the weights"
        )
    return values
