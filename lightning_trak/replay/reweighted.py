"""A recorded run, trained again with other weights of its examples.

Training is a function of the weights w of the examples: the loss of a batch is sum_i w_i l_i / (size of the batch),
with the size that was recorded, whatever the weights are. Order, batches, random numbers and hyperparameters are those
of the recording. This is the function that :mod:`~lightning_trak.replay.reverse.run` differentiates at w = 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import modules_in_eval
from lightning_trak.replay.losses import Losses, losses_of, require_losses, require_step
from lightning_trak.replay.player import Loss, Player
from lightning_trak.replay.recording.records import MicroBatch, StepRecord
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.replay.targets import differentiable, output_at, targets_alone
from lightning_trak.running.data.ordering import require_order


class Reweighted:
    """Trains a recorded run again with other weights of its examples.

    Args:
        player: does the steps of the run, which has ended.
        losses: ``(module, batch) -> losses`` of shape ``(batch,)``, the training loss of each example.
        first: the first step whose examples are weighted. Training begins with the last full state before it.
        check_losses: whether the first call of :meth:`train` checks the losses. False saves about two trainings, for
            callers that check them themselves.

    Attributes:
        player: as given.
        num_train: the number of weights.
        recording: the recording.
        losses: as given.

    Raises:
        ValueError: if the loader's collate function changes the order of examples.
    """

    def __init__(self, player: Player, losses: Losses, *, first: int = 0, check_losses: bool = True) -> None:
        require_order(player.loader, "the training data")
        self.player, recording = player, player.recording
        self.num_train: int = recording.run["num_train"]
        self.recording, self.losses, self._check_losses = recording, losses, check_losses
        self._first, self._start = first, max(step for step in recording.state_steps if step <= first)
        self._skipped: set[tuple[int, int]] | None = None

    def records(self) -> Iterator[StepRecord]:
        """The steps of the run, from the first state on."""
        return map(self.recording.record, range(self._start, self.recording.num_steps))

    @property
    def start(self) -> TrainingState:
        """The recorded state that training begins with."""
        return self.recording.state(self._start)

    def skipped(self) -> set[tuple[int, int]]:
        """The micro-batches that training skipped: numbers of a step, and of a micro-batch in it.

        The first call repeats the run, at whose end the player then is. Unless ``check_losses`` is false, it takes
        about three trainings, and checks each step: the mean of the examples' losses must be what ``training_step``
        returned, and the step by the losses, at w = 1, must be the step of training.

        Raises:
            ReplayError: if the run cannot be repeated, or the losses are not those that training minimized.
        """
        if self._skipped is not None:
            return self._skipped
        player, ones = self.player, torch.ones(self.num_train)
        skipped: set[tuple[int, int]] = set()
        player.load(self.start)
        player.open(self.records())
        for record in self.records():
            played = player.step(record, remember=True)
            assert played is not None
            player.require_close(record.step + 1)
            empty = {(record.step, number) for number, loss in enumerate(played.losses) if loss is None}
            skipped |= empty
            if not self._check_losses:
                continue
            after = player.state
            player.load(played.before)
            means = player.descend(record, played.batches, self.loss(record, ones, empty))
            require_losses(
                played.record, played.losses, [0.0 if mean is None else float(mean) for mean in means], player.dtype
            )
            require_step(played, after, dict(player.state.tensors()), player.dtype, player.update.rounding)
            player.load(after)
        self._skipped = skipped
        return skipped

    def train(self, weights: Tensor, start: TrainingState | None = None) -> TrainingState:
        """Train with other weights.

        The first call also checks the losses, see :meth:`skipped`.

        Args:
            weights: of all examples, ``(num_train,)``: 1 is the recorded run, and 0 takes an example's loss away.
            start: the state to begin with; default: the recorded one.

        Returns:
            The state at the end, a copy. The player's module has it, too.

        Raises:
            ValueError: if the weights have a wrong shape or are not finite.
            ReplayError: see :meth:`skipped`.
        """
        weights = checked_weights(weights, (self.num_train,))
        skipped = self.skipped()
        ones = torch.ones_like(weights)
        self.player.load(start or self.start)
        self.player.open(self.records())
        for record in self.records():
            own = weights if record.step >= self._first else ones
            self.player.step(record, loss=self.loss(record, own, skipped))
        return self.player.state

    def outputs(
        self,
        output: ModelOutput,
        targets: DataLoader[Any],
        datamodule: L.LightningDataModule | None,
        finite: bool = True,
    ) -> Tensor:
        """The outputs of the player's module at targets, each of them alone and in eval mode.

        Args:
            output: the output.
            targets: the loader of the targets.
            datamodule: the data module that gave it, if there is one.
            finite: whether outputs that are not finite are refused.

        Returns:
            On the CPU, ``(num_targets,)``, in the run's precision.

        Raises:
            ValueError: if an output is not one number, or not finite.
        """
        player = self.player
        modules_in_eval(output, player.device)
        player.module.eval()
        with differentiable(player), torch.no_grad():
            found = [
                output_at(player.module, output, batch, number, finite)
                for number, batch in enumerate(targets_alone(player, targets, datamodule))
            ]
        return torch.cat(found).cpu()

    def loss(self, record: StepRecord, weights: Tensor, skipped: Collection[tuple[int, int]] | None = None) -> Loss:
        """What a step minimizes with weights.

        Args:
            record: the step.
            weights: of all examples, ``(num_train,)``.
            skipped: the micro-batches that are skipped; default: :meth:`skipped`.
        """
        skipped = self.skipped() if skipped is None else skipped
        numbers = iter(range(len(record.micro_batches)))

        def loss(batch: Any, micro: MicroBatch) -> Tensor | None:
            if (record.step, next(numbers)) in skipped:
                return None
            size = len(micro.positions)
            losses = losses_of(self.losses, self.player.module, batch, size)
            return (weights[micro.positions].to(losses) * losses).sum() / size

        return loss


def checked_weights(weights: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Weights of examples, on the CPU.

    Raises:
        ValueError: if they have another shape or are not finite numbers.
    """
    if not isinstance(weights, Tensor) or weights.shape != shape:
        received = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"expected weights of all training examples, a tensor of shape {shape}, received {received}")
    if weights.is_complex() or not weights.isfinite().all():
        raise ValueError(f"weights must be finite real numbers; {int((~weights.isfinite()).sum())} of them are not")
    return weights.detach().cpu()
