"""A recorded run trained with many weights of its examples at once.

All members share their batches, so a step of a small model takes little longer for fifty members than for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from torch.func import vmap
from torch.utils.data import DataLoader

from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import modules_in_eval
from lightning_trak.replay.comparison import is_other_step
from lightning_trak.replay.optimizers.base import OptimizerStep
from lightning_trak.replay.optimizers.clipping import clipped
from lightning_trak.replay.player import ReplayError
from lightning_trak.replay.recording.records import StepRecord
from lightning_trak.replay.recording.states import named_parameters
from lightning_trak.replay.reweighted import Reweighted, checked_weights
from lightning_trak.replay.targets import differentiable, targets_alone
from lightning_trak.retraining.training.alone import FactoryError
from lightning_trak.retraining.training.together import StackedModules
from lightning_trak.running.random_states import restore_random_states
from lightning_trak.running.training_step import set_place
from lightning_trak.texts.messages import in_one_line


class StackedRun:
    """Trains a recorded run again with many weights at once, by `torch.func.vmap` and optimizer steps as functions.

    The result is that of :class:`~lightning_trak.replay.reweighted.Reweighted` for each row of weights, up to rounding.
    The first step of the first and last row is compared with it.

    Args:
        run: the run. Its player is used, too.
        weights: of all examples, ``(num_members, num_train)``.

    Raises:
        TypeError: if the optimizer's step is rounded, or depends on numbers other than its moments and count of steps.
        ValueError: if the weights have a wrong shape or are not finite, the run cannot be repeated, or members have
            another first step together than alone.
    """

    def __init__(self, run: Reweighted, weights: Tensor) -> None:
        self._run, self._player = run, run.player
        self._weights = checked_weights(weights, (len(weights), run.num_train))
        _require_functional(run)

    def train(self) -> None:
        """Train all members from the recorded first state to the end."""
        player, run = self._player, self._run
        skipped = run.skipped()
        alone = [self._first_step_alone(row) for row in (0, len(self._weights) - 1)]
        first = run.recording.state(0)
        player.load(first)
        stack = self._stack = StackedModules([player.module] * len(self._weights), player.device)
        self._moments = {
            name: {
                key: value.to(player.device).expand(len(self._weights), *value.shape).clone()
                for key, value in moments.items()
                if key in player.update.moments
            }
            for name, moments in first.moments.items()
        }
        self._counts = {name: float(moments.get("step", 0.0)) for name, moments in first.moments.items()}
        self._parameters = named_parameters(stack.stacked)
        player.open(run.records())
        for record in run.records():
            self._arrange(record)
            self._step(record, player.batches(record), skipped)
            if record.step == 0:
                self._require_as_alone(alone)

    def outputs(
        self, output: ModelOutput, targets: DataLoader[Any], datamodule: L.LightningDataModule | None
    ) -> Tensor:
        """The outputs of all members at targets, each target alone and in eval mode.

        Args:
            output: the output.
            targets: the loader of the targets.
            datamodule: the data module that gave it, if there is one.

        Returns:
            On the CPU, ``(num_members, num_targets)``. Some may not be finite.
        """
        player = self._player
        modules_in_eval(output, player.device)
        for module in (self._stack.stacked, player.module):  # the player's has the hooks that move targets
            module.eval()
        with differentiable(player), torch.no_grad():
            found = [self._stack.outputs(output, batch) for batch in targets_alone(player, targets, datamodule)]
        for number, values in enumerate(found):
            if values.shape != (len(self._weights), 1):
                raise ValueError(
                    f"{type(output).__name__}.output returned {tuple(values.shape[1:])} for target {number} alone;"
                    " expected one number per example, shape (1,)"
                )
        return torch.cat(found, 1).cpu()

    def _arrange(self, record: StepRecord) -> None:
        """Set modes and flags of the stacked module to those of a step."""
        player, stacked = self._player, self._stack.stacked
        player.arrange(record)
        for own, part in zip(player.module.modules(), stacked.modules(), strict=True):
            part.training = own.training
        for name, parameter in player.parameters.items():
            self._parameters[name].requires_grad_(parameter.requires_grad)
        set_place(cast(L.LightningModule, stacked), record.epoch, record.step, player.optimizer)

    def _step(self, record: StepRecord, batches: Iterator[Any], skipped: set[tuple[int, int]]) -> None:
        player = self._player
        trained = record.structure.trained
        sums: dict[str, Tensor] = {}
        for number, (micro, batch) in enumerate(zip(record.micro_batches, batches, strict=True)):
            if (record.step, number) in skipped:
                continue
            size = len(micro.positions)
            restore_random_states(micro.random_states, player.device)
            with player.computing():
                losses = self._stack.map(self._run.losses, batch, in_dims=None, randomness="same")
                weights = self._weights[:, micro.positions].to(losses)
                total = (weights * losses).sum() / size / record.settings.accumulate
                tensors = [self._parameters[name] for name in trained]
                gradients = _gradients(total, tensors)
            for name, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    sums[name] = sums[name] + gradient if name in sums else gradient
        if not sums:
            return
        before = {name: self._parameters[name].detach() for name in sums}
        kept = {name: self._moments.get(name, {}) for name in sums}
        counts = {name: self._counts.get(name, 0.0) for name in sums}
        with torch.no_grad():
            after, moments = vmap(
                lambda parameters, gradients, kept: _updated(player.update, record, parameters, gradients, kept, counts)
            )(before, sums, kept)
        for name, tensor in after.items():
            self._parameters[name].data = tensor
            self._counts[name] = counts[name] + 1
        self._moments |= moments

    def _first_step_alone(self, row: int) -> dict[str, Tensor]:
        """The parameters after the first step of one member alone."""
        player, run = self._player, self._run
        player.load(run.recording.state(0))
        first = run.recording.record(0)
        player.open([first])
        player.step(first, loss=run.loss(first, self._weights[row]))
        return {name: parameter.detach().clone() for name, parameter in player.parameters.items()}

    def _require_as_alone(self, alone: list[dict[str, Tensor]]) -> None:
        player = self._player
        before = self._run.recording.state(0).parameters
        for row, expected in zip((0, len(self._weights) - 1), alone, strict=True):
            off = moved = size = 0.0
            for name, tensor in expected.items():
                off += float((self._parameters[name].detach()[row] - tensor).double().square().sum())
                moved += float((before[name].to(tensor.device) - tensor).double().square().sum())
                size += float(tensor.double().square().sum())
            if is_other_step(off**0.5, moved**0.5, size**0.5, player.dtype):
                raise ReplayError(
                    f"the first step of a member differs between training together and alone by {off**0.5:.3g}, where"
                    f" the weights move by {moved**0.5:.3g}: perhaps vmap draws other random numbers (dropout on a"
                    " GPU or within attention), or the module branches on values; leave together= out"
                )


def _gradients(total: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of all members, whose losses are added up.

    Raises:
        FactoryError: if operations are left to the backward pass, which is no longer that of many members at once.
    """
    try:
        return torch.autograd.grad(total, parameters, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise FactoryError(
            f"the losses of members together cannot be differentiated: {in_one_line(error)}. Activation checkpointing"
            " is a common cause; leave together= out"
        ) from error


def _updated(
    update: OptimizerStep,
    record: StepRecord,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    kept: Mapping[str, Mapping[str, Tensor]],
    counts: Mapping[str, float],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Parameters and moments of one member after a step of the optimizer."""
    bounded = clipped(gradients, record.settings.clip, record.settings.clip_by)
    after, moments = {}, {}
    for names, group in zip(record.structure.groups, record.settings.groups, strict=True):
        for name in names:
            if name in bounded:
                count = {"step": torch.tensor(counts[name])} if counts[name] else {}
                after[name], moments[name] = update.step(
                    parameters[name], bounded[name], {**kept[name], **count}, group
                )
    return after, moments


def _require_functional(run: Reweighted) -> None:
    """Check that the optimizer's step as a function does all that the optimizer does."""
    update = run.player.update
    name = type(update).__name__
    if update.rounding > 0:
        raise TypeError(f"{name} rounds its steps, so members together would differ from others; leave together= out")
    last = run.recording.state(max(run.recording.state_steps))
    others = {key for moments in last.moments.values() for key in moments} - {*update.moments, "step"}
    if others:
        raise TypeError(
            f"the optimizer keeps {', '.join(sorted(others))}, which {name} does not change; leave together= out"
        )
