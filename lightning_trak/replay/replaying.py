"""Repeats a recorded run, and compares it with the recording."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import lightning as L
from torch import nn
from tqdm import tqdm

from lightning_trak.replay.player import Player, ReplayError
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.recording.records import StepRecord
from lightning_trak.running.data.sources import Data, datamodule_of, single_loader
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.strategies import require_whole_parameters
from lightning_trak.running.trainers import trainer_of


@dataclass(frozen=True)
class Replayed:
    """How well a repeated run agrees with its recording.

    Attributes:
        steps: the number of optimizer steps.
        compared: the number of full states that were compared.
        identical: whether all of them have the same bits.
        largest_difference: the largest norm of the difference of a tensor, relative to the norm of the recorded one.
    """

    steps: int
    compared: int
    identical: bool
    largest_difference: float


def replay(
    model: nn.Module,
    recording: str | os.PathLike[str],
    trainer: L.Trainer | None,
    train: Data,
    *,
    tolerance: float | None = None,
    progress_bar: bool = True,
) -> Replayed:
    """Repeat a recorded run step by step, and compare each full state of the recording with the repeated one.

    On the device and with the versions of the run, the states are usually the same bit for bit. On other hardware,
    rounding differs, and training may amplify it.

    Args:
        model: the LightningModule that was trained, or one of the same class and options. Its weights do not matter.
        recording: the directory of a :class:`~lightning_trak.TrainingRecorder`.
        trainer: any Trainer. Its device is used, and it is left as it was. None: a GPU if there is one.
        train: the training data, as they were recorded.
        tolerance: the largest allowed difference of a tensor from the recorded one, relative to its norm; default:
            1e-3 for a run in float32 and 1e-6 for one in float64. 0 demands the same bits.
        progress_bar: whether to show a progress bar.

    Returns:
        The number of steps, and how well the states agree.

    Raises:
        ValueError: if a state differs by more than the tolerance (a ``ReplayError``), or if the recording is not
            finished, or if model or data are not those of the recording.

    Example::

        assert replay(model, "run/recording", trainer, train_loader).identical
    """
    trainer = trainer_of(trainer)
    require_whole_parameters(trainer)
    recorded = Recording(recording)
    recorded.require_finished()
    datamodule = datamodule_of(train)
    with isolated_random_states():
        loader = single_loader(train, "fit", trainer)
        player = Player(model, recorded, loader, datamodule, trainer.strategy.root_device)
        player.load(recorded.state(0))
        total = recorded.num_steps

        def records() -> Iterator[StepRecord]:
            return map(recorded.record, range(total))

        player.open(records())
        found = []
        for record in tqdm(records(), "Replaying", total, disable=not progress_bar):
            player.step(record)
            compared = player.require_close(record.step + 1, tolerance)
            if compared is not None:
                if tolerance == 0 and not compared.identical:
                    raise ReplayError(
                        f"before step {record.step + 1}, {compared.name} has other bits than recorded; leave"
                        " tolerance=0 out to allow for rounding"
                    )
                found.append(compared)
    return Replayed(
        total, len(found), all(one.identical for one in found), max((one.largest for one in found), default=0.0)
    )
