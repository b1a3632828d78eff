"""The outputs of a module in a recorded run at targets, each of them alone and in eval mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from lightning_trak.compatibility import BatchNorm
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, unchanged
from lightning_trak.replay.group_norm import PlainGroupNorm
from lightning_trak.replay.player import Player
from lightning_trak.running.data.loading import load, num_examples


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
        if any(issubclass(kind, nn.RNNBase) for kind in player.kinds):
            stack.enter_context(cudnn.flags(enabled=False))
        if any(issubclass(kind, nn.GroupNorm) for kind in player.kinds):
            stack.enter_context(PlainGroupNorm())
        yield


def targets_alone(
    player: Player,
    targets: DataLoader[Any],
    datamodule: L.LightningDataModule | None,
    numbers: Sequence[int] | None = None,
) -> Iterator[Any]:
    """Batches of one target each, on the device.

    Args:
        player: moves them.
        targets: the loader of the targets.
        datamodule: the data module that gave it, if there is one.
        numbers: which targets; default: all.

    Raises:
        ValueError: if batch normalization makes the outputs of a batch depend on each other in eval mode, too.
    """
    if any(isinstance(part, BatchNorm) and part.running_mean is None for part in player.module.modules()):
        raise ValueError(
            f"{type(player.module).__name__} has no output for one target alone, since batch normalization without"
            " running statistics needs the rest of the batch; use track_running_stats=True or another normalization"
        )
    numbers = range(num_examples(targets)) if numbers is None else numbers
    return player.moved(load(targets, [[number] for number in numbers]), datamodule)


def output_at(module: nn.Module, output: ModelOutput, batch: Any, number: int, finite: bool = True) -> Tensor:
    """The output at one target.

    Args:
        module: a module in eval mode.
        output: the output.
        batch: the target alone, as a batch. It is not changed.
        number: the position of the target in its dataset.
        finite: whether an output that is not finite is refused.

    Returns:
        Shape ``(1,)``, with its graph.

    Raises:
        ValueError: if the output is not one number, or not finite.
    """
    with unchanged(module, output):
        values = output.output(module, copy.deepcopy(batch))
    if not isinstance(values, Tensor) or values.shape != (1,):
        received = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"{type(output).__name__}.output returned {received} for target {number} alone; expected one number per"
            " example, shape (1,)"
        )
    if finite and not values.isfinite().all():
        raise ValueError(
            f"the output at target {number} is {float(values.detach()):g}; leave the target out, or look for NaN in it"
            " and in the weights"
        )
    return values
