"""How much faster small models are retrained at once than one after another."""

import itertools
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.tasks import DigitsMLP
from benchmarks.timing import Row, Run, ratios, rows
from examples.digits import make_data, make_trainer
from lightning_trak.retraining import RetrainingFleet, random_subsets

ALONE, TOGETHER = 5, 50


def fleet(settings: Run) -> list[Row]:
    """Fleets of a perceptron for the digits, from its factories to its outputs on disk."""
    train, targets = make_data()
    masks = random_subsets(len(train), TOGETHER, seed=1)
    with tempfile.TemporaryDirectory(dir=settings.out) as folder:
        places = map(str, itertools.count())

        def run(count: int, together: int | None = None) -> None:
            RetrainingFleet(
                Path(folder) / next(places),
                DigitsMLP,
                make_trainer,
                DataLoader(train, batch_size=100),
                targets,
                masks[:count],
            ).run(together=together, progress_bar=False)

        def together(threads: int) -> None:
            torch.set_num_threads(threads)
            run(TOGETHER, TOGETHER)
            torch.set_num_threads(1)  # what is fastest for one small model

        actions = {f"digits MLP, {count} thread{'s' * (count > 1)}": partial(together, count) for count in (1, 2)}
        times = ratios(lambda: run(ALONE), actions, settings.repetitions)
    speedups = {name: [TOGETHER / ALONE / time for time in found] for name, found in times.items()}
    return rows("fleet", speedups, f"models, {TOGETHER} at once, in the time of one alone")
