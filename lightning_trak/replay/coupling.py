"""Whether the training loss of an example depends on the rest of its batch.

Batch normalization, in-batch negatives, risk sets and denominators of a whole batch do this. The weight of an example
then multiplies its own loss alone, and with weight 0 it still changes the losses of others. Scores and members of a
fleet are right about these weights. They may say little about training without the example.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from lightning_trak.compatibility import BatchNorm, collect_rng_states
from lightning_trak.fingerprints.digests import content_digest
from lightning_trak.outputs.evaluating import unchanged
from lightning_trak.replay.losses import Losses, losses_of
from lightning_trak.replay.player import Player
from lightning_trak.replay.recording.records import StepRecord
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.running.data.content import FEW, spread
from lightning_trak.running.random_states import restore_random_states

_TOLERANCE = 1e-2  # of the largest loss; less does not matter


def warn_of_coupling(player: Player, losses: Losses, shown: str, stacklevel: int, first: int = 0) -> None:
    """Warn if weight 0 is not the same as removal from the data, since other losses of the batch stay as they are.

    Args:
        player: does the steps of the run. Its state changes.
        losses: ``(module, batch) -> losses`` of shape ``(batch,)``.
        shown: the beginning of what is shown by weights: ``"scores say"`` or ``"members show"``.
        stacklevel: how far away the user's call is from this call: 1 is the caller.
        first: the first step whose weights count.
    """
    coupled = coupling(player, losses)
    if player.normalizes_batches(first):
        warnings.warn(
            "the model has batch normalization in train mode: an example with weight 0 is still part of the batch's"
            f" statistics, so {shown} what its loss did, not what its removal from the data does",
            stacklevel=stacklevel + 1,
        )
    if coupled:
        warnings.warn(
            f"{coupled}, so {shown} what its own loss did, not what its removal from the data does",
            stacklevel=stacklevel + 1,
        )


def coupling(player: Player, losses: Losses) -> str | None:
    """How the losses of a batch depend on each other, in words; None if they do not, or cannot be computed.

    In the batches of a few steps, one half is kept, and copies of one of its examples replace the other half. The size
    of the batch, its random numbers and the module's state stay the same, and modules are in the mode that they were
    trained in. Only batch normalization, which is known without trying, takes its running statistics. If random numbers
    would not go to the same places, as in dropout of texts that are padded to another length, modules are in
    eval mode.

    Args:
        player: does the steps of the run. Its state changes.
        losses: ``(module, batch) -> losses`` of shape ``(batch,)``.
    """
    recording = player.recording
    states = sorted(recording.state_steps)
    state = recording.state(states[len(states) // 2])  # losses may be alike at the start, and 0 at the end
    steps = spread(recording.num_steps, FEW)  # several, since a batch without an event has no risk set
    halves = [_Half(recording.record(step), number % 2) for number, step in enumerate(steps)]
    halves = [half for half in halves if half.kept]
    batches = player.batches_of(positions for half in halves for positions in (half.positions, half.replaced))
    try:
        for half in halves:
            found = half.compare(player, state, losses, batches)
            if found:
                return found
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # some losses refuse copies of one example, or do not exist in eval mode
        rank_zero_info(
            "it is not checked whether the losses of a batch depend on each other, because they cannot be computed for"
            f" copies of one example, or in eval mode: {type(error).__name__}: {error}"
        )
    return None


class _Half:
    """A half of a step's first batch.

    Args:
        record: the step.
        side: which half.
    """

    def __init__(self, record: StepRecord, side: int) -> None:
        self._record = record
        self._micro = record.micro_batches[0]
        self.positions = self._micro.positions
        # By the parity of the ones in a row's number: neighbours are apart, and so are the rows of two equal halves.
        ours = [row.bit_count() % 2 == side for row in range(len(self.positions))]
        self.kept = [row for row, own in enumerate(ours) if own]
        self._copied = self.positions[self.kept[0] if self.kept else 0]
        self.replaced = [position if own else self._copied for position, own in zip(self.positions, ours, strict=True)]

    def compare(self, player: Player, state: TrainingState, losses: Losses, batches: Iterator[Any]) -> str | None:
        """How the losses of this half depend on the other half, in words; None if they do not."""
        whole, replaced = next(batches), next(batches)

        def values(batch: Any, training: bool) -> tuple[Tensor, str]:
            """The losses, and a digest of what the places of random numbers follow from."""
            player.load(state)  # each time, since a pass in train mode may change buffers
            player.arrange(self._record)
            for part in player.module.modules():
                if isinstance(part, BatchNorm) or not training:
                    part.eval()
            restore_random_states(self._micro.random_states, player.device)
            shapes: list[torch.Size] = []
            batch = copy.deepcopy(batch)  # losses may change it
            apply_to_collection(batch, Tensor, lambda tensor: shapes.append(tensor.shape))
            with player.computing(), unchanged(player.module):
                found = losses_of(losses, player.module, batch, len(self.positions)).detach().cpu()[self.kept]
            return found, content_digest([shapes, collect_rng_states()])

        (together, places), (apart, others) = values(whole, True), values(replaced, True)
        if places != others:
            together, apart = (values(batch, False)[0] for batch in (whole, replaced))
        off = (together - apart).abs()
        if not together.isfinite().all() or off.max() <= _TOLERANCE * together.abs().max():
            return None
        row = int(off.argmax())
        return (
            "the training loss of an example depends on the rest of its batch, as with in-batch negatives, risk sets, a"
            " mean over the whole batch or padding that is not masked: that of example"
            f" {self.positions[self.kept[row]]} is {together[row]:.4g} in its batch, and {apart[row]:.4g} if copies of"
            f" example {self._copied} replace half of the batch. An example with weight 0 is still part of the losses"
            " of others"
        )
