"""Repeats the first step of a run at once, so that a run that cannot be repeated ends here and not after training."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_trak.replay.comparison import other_step
from lightning_trak.replay.player import Player
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.recording.records import StepRecord
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.running.data.loaders import like
from lightning_trak.running.random_states import isolated_random_states


class _Recorded(Recording):
    """A step that is not on disk yet.

    Args:
        run: what the run trains, see :attr:`Recording.run`.
        step: the step.
    """

    def __init__(self, run: dict[str, Any], step: StepRecord) -> None:
        self.manifest = {"run": run}
        self._step = step

    @override
    def record(self, step: int) -> StepRecord:
        return self._step


def require_repeatable(
    trainer: Trainer,
    module: LightningModule,
    run: dict[str, Any],
    record: StepRecord,
    before: TrainingState,
    after: TrainingState,
) -> None:
    """Repeat a step with a copy of the module, and compare.

    Args:
        trainer: the Trainer.
        module: its module.
        run: what the run trains, see :attr:`Recording.run`.
        record: the step.
        before: the state before it.
        after: the state after it.

    Raises:
        ValueError: if the copy takes another step. If it can take none, this says nothing: a module of the same class
            may be given when the run is repeated, and what it lacks is refused then.
    """
    try:
        with isolated_random_states(), torch.compiler.set_stance("force_eager"):
            player = _player(trainer, module, _Recorded(run, record))
            player.load(before)
            player.open([record])
            player.step(record)
            found = player.state
    except Exception:
        return
    other = other_step(
        dict(before.tensors()), dict(found.tensors()), dict(after.tensors()), player.dtype, player.update.rounding
    )
    if other is not None and math.isfinite(other.off):  # else training diverges, whoever does it
        raise ValueError(
            "TrainingRecorder cannot record this run, because a copy of the module takes another step"
            f" {record.step}: the {other.kind} should move by {other.moved:.3g}, and are off by {other.off:.3g}."
            " Perhaps a hook or a callback changes gradients or weights (on_before_optimizer_step, on_after_backward;"
            " use Trainer(gradient_clip_val=...) for clipping, and the loss for the rest), or the module has a state"
            " outside of parameters and buffers, such as a counter or a random generator of its own; train without"
        )


def _player(trainer: Trainer, module: LightningModule, recording: Recording) -> Player:
    loader = cast(DataLoader[Any], trainer.train_dataloader)
    loader = like(loader, loader.dataset, num_workers=min(1, loader.num_workers))
    datamodule: LightningDataModule | None = trainer.datamodule  # type: ignore[attr-defined]
    return Player(module, recording, loader, datamodule, trainer.strategy.root_device)
