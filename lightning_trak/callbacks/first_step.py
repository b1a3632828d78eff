"""Repeats the first step of a run at once, so that a run that cannot be repeated ends here and not after training."""

from __future__ import annotations

import math
from typing import cast

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_trak.replay.comparison import other_step
from lightning_trak.replay.player import Player
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.running.data.loaders import like
from lightning_trak.running.random_states import isolated_random_states


def require_repeatable(
    trainer: Trainer, module: LightningModule, recording: Recording, step: int, after: TrainingState
) -> None:
    """Repeat a step with a copy of the module, and compare.

    Args:
        trainer: the Trainer.
        module: its module.
        recording: has the step and the state before it.
        step: the number of the step.
        after: the state after it.

    Raises:
        ValueError: if the copy takes another step. If it can take none, this says nothing: a module of the same class
            may be given when the run is repeated, and what it lacks is refused then.
    """
    try:
        before, found, player = _repeated(trainer, module, recording, step)
    except Exception:
        return
    other = other_step(
        dict(before.tensors()), dict(found.tensors()), dict(after.tensors()), player.dtype, player.update.rounding
    )
    if other is not None and math.isfinite(other.off):  # else training diverges, whoever does it
        raise ValueError(
            f"TrainingRecorder cannot record this run, because a copy of the module takes another step {step}: the"
            f" {other.kind} should move by {other.moved:.3g}, and are off by {other.off:.3g}. Perhaps a hook or a"
            " callback changes gradients or weights (on_before_optimizer_step, on_after_backward; use"
            " Trainer(gradient_clip_val=...) for clipping, and the loss for the rest), or the module has a state"
            " outside of parameters and buffers, such as a counter or a random generator of its own; train without"
        )


def _repeated(
    trainer: Trainer, module: LightningModule, recording: Recording, step: int
) -> tuple[TrainingState, TrainingState, Player]:
    """The states before and after the step, and the player that did it."""
    before, record = recording.state(step), recording.record(step)
    loader = cast(torch.utils.data.DataLoader[object], trainer.train_dataloader)
    with isolated_random_states(), torch.compiler.set_stance("force_eager"):
        player = Player(
            module,
            recording,
            like(loader, loader.dataset, num_workers=min(1, loader.num_workers)),
            trainer.datamodule,  # type: ignore[attr-defined]
            trainer.strategy.root_device,
        )
        player.load(before)
        player.open([record])
        player.step(record)
        return before, player.state, player
