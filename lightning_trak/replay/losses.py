"""The training loss of each example, and whether a step of training went along the gradient of their mean."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import unchanged
from lightning_trak.replay.comparison import other_step
from lightning_trak.replay.player import Played, Player, ReplayError
from lightning_trak.replay.recording.records import StepRecord
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.running.data.loading import LEAVES_OUT
from lightning_trak.running.random_states import restore_random_states

# (module, batch) -> the training loss of each example, of shape (batch,)
Losses = Callable[[nn.Module, Any], Tensor]

_LOSS_ERRORS = {torch.float32: (1e-4, 1e-6), torch.float64: (1e-9, 1e-12)}


def declared_losses(output: ModelOutput, losses: Losses | None) -> Losses:
    """The training losses that a user gives, or those that an output declares."""
    return losses or (lambda module, batch: output.loss(output.output(module, batch)))


def training_losses(player: Player, output: ModelOutput, losses: Losses | None) -> Losses:
    """The training losses that a user gives, or those that an output declares, times a factor.

    An output declares its loss up to a factor: the half of a squared error stands for the squared error. The factor is
    what makes the mean of the losses of two batches the loss of training.

    Args:
        player: does the steps of the run. Its state changes.
        output: the output.
        losses: ``(module, batch) -> losses`` of shape ``(batch,)``; they are taken as they are.

    Raises:
        ReplayError: if they are not those that training minimizes, judged by the last batch, before longer work.
    """
    declared = declared_losses(output, losses)
    recording = player.recording
    state = recording.state(max(recording.state_steps))
    first, last = (recording.record(step) for step in (0, recording.num_steps - 1))
    loss, mean = _compared(player, state, last, declared)
    factor = 1.0
    if losses is None and loss is not None:
        other_loss, other_mean = _compared(player, state, first, declared)
        factor = _factor([(loss, mean), (other_loss or math.nan, other_mean)], _LOSS_ERRORS[player.dtype][0])
    require_losses(last, [loss], [factor * mean], player.dtype)
    return declared if factor == 1 else lambda module, batch: factor * declared(module, batch)


def _compared(player: Player, state: TrainingState, record: StepRecord, losses: Losses) -> tuple[float | None, float]:
    """What ``training_step`` returns at a state for the first batch of a step, and the mean of the examples' losses."""
    player.arrange(record)
    player.open([record])
    batch, micro = next(player.batches(record)), record.micro_batches[0]

    def value(loss: Callable[[Any], Tensor | None]) -> float | None:
        player.load(state)  # a forward pass may change buffers
        restore_random_states(micro.random_states, player.device)
        with player.computing(), unchanged(player.module):
            found = loss(copy.deepcopy(batch))
        return None if found is None else float(found.detach())

    mean = value(lambda batch: losses_of(losses, player.module, batch, len(micro.positions)).mean())
    assert mean is not None
    return value(lambda batch: player.training_loss(batch, micro)), mean


def _factor(pairs: Sequence[tuple[float, float]], tolerance: float) -> float:
    """The factor between the numbers of all pairs; 1 if they have no common one."""
    ratios = [loss / mean if mean else math.nan for loss, mean in pairs]
    same = all(math.isclose(ratio, ratios[0], rel_tol=tolerance) for ratio in ratios)
    if not same or not 0 < ratios[0] < math.inf or math.isclose(ratios[0], 1, rel_tol=tolerance):
        return 1.0
    return ratios[0]


def losses_of(losses: Losses, module: nn.Module, batch: Any, expected: int) -> Tensor:
    """The training loss of each example of a batch.

    Args:
        losses: the losses.
        module: the module.
        batch: a batch. It may be changed.
        expected: the number of its examples.

    Raises:
        ValueError: if there is not one loss for each example.
    """
    found = losses(module, batch)
    if not isinstance(found, Tensor) or found.shape != (expected,):
        received = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        few = f": {LEAVES_OUT}" if isinstance(found, Tensor) and found.ndim == 1 and len(found) < expected else ""
        raise ValueError(f"expected one training loss per example, shape ({expected},), received {received}{few}")
    return found


def require_losses(
    record: StepRecord, losses: Sequence[Tensor | float | None], means: Sequence[float], dtype: torch.dtype
) -> None:
    """Check that the means of the examples' losses are what ``training_step`` returned.

    Args:
        record: the step.
        losses: what ``training_step`` returned for each micro-batch; None if it returned none.
        means: the mean of the losses of each micro-batch.
        dtype: the dtype of the weights.

    Raises:
        ReplayError: if they differ by more than rounding.
    """
    relative, absolute = _LOSS_ERRORS[dtype]
    for number, (loss, mean) in enumerate(zip(losses, means, strict=True)):
        if loss is None:
            continue
        expected = float(loss)
        if math.isnan(mean) and not math.isnan(expected):
            positions = ", ".join(map(str, record.micro_batches[number].positions))
            raise ReplayError(
                f"training_step returned {expected:.6g} for micro-batch {number} of step {record.step}, but the"
                f" loss of an example is NaN. It is one of the training examples {positions:.200}. Perhaps the declared"
                " output takes its labels from another part of the batch than training_step (labels_key= names the"
                " part), or training_step leaves out examples that have no valid label; then pass losses=, a function"
                " (module, batch) -> losses of shape (batch,) whose mean training_step returns"
            )
        if not abs(mean - expected) <= relative * abs(expected) + absolute:
            raise ReplayError(
                f"training_step returned {expected:.6g} for micro-batch {number} of step {record.step}, but"
                f" the mean of the examples' losses is {mean:.6g}. The loss of an example is what losses= gives, or"
                " else that of the declared output. If training minimizes something else (label smoothing, a penalty,"
                " a mean over the pixels or tokens of the whole batch), pass losses=, a function (module, batch) ->"
                " losses of shape (batch,) whose mean training_step returns. If there is none, as for a Dice loss of"
                " the whole batch, use a method that needs no recording, such as TRAK"
            )


def require_step(
    played: Played, after: TrainingState, outputs: Mapping[str, Tensor], dtype: torch.dtype, rounding: float
) -> None:
    """Check that a step by the mean of the losses does what training did, to the weights and to each moment.

    Args:
        played: the step of training.
        after: the state after it.
        outputs: tensors after the other step, by the names of ``TrainingState.tensors()``.
        dtype: the dtype of the weights.
        rounding: by how much the optimizer rounds its step, relative to the step.

    Raises:
        ReplayError: if they differ by more than rounding.
    """
    other = other_step(dict(played.before.tensors()), outputs, dict(after.tensors()), dtype, rounding)
    if other is not None:
        raise ReplayError(
            f"step {played.record.step} moved the {other.kind} by {other.moved:.3g}, but the gradient of the"
            f" examples' losses gives a step that differs from it by {other.off:.3g}: training_step, a hook"
            " or a callback adds something to the gradient, or the losses are not those that training_step"
            " minimizes"
        )
    changed = [
        name
        for name, old in played.before.parameters.items()
        if f"parameter/{name}" not in outputs and not torch.equal(old, after.parameters[name])
    ]
    if changed:
        raise ReplayError(
            f'step {played.record.step} changed the parameter "{changed[0]}", through which no gradient of an'
            " example's loss goes: the losses are not those that training_step minimizes, or training_step assigns"
            " weights itself, such as those of a target network or of an average, whose derivative is not known"
        )


def require_unchanged(parameters: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    """Check that forward passes have left the weights as they were.

    Args:
        parameters: the weights, by name.
        before: what they were.

    Raises:
        ReplayError: if one has changed.
    """
    for name, kept in before.items():
        if not torch.equal(parameters[name], kept.to(parameters[name].device)):
            raise ReplayError(
                f'the forward pass changes the parameter "{name}" in place (nn.Embedding(max_norm=) and'
                " weight.data.clamp_() do so), and autograd does not know the derivative of this change; compute"
                " another tensor from the parameter instead, or use a method that differentiates once, such as TRAK"
            )
