"""How much faster it is to retrain small models at once than one after another."""

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

ALONE, TOGETHER = 10, 100


def fleet(settings: Run) -> list[Row]:
    """Time fleets of a perceptron for the digits, including making the models and writing their outputs."""
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

        speedups = {}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            actions = {"together": partial(run, TOGETHER, TOGETHER)}
            times = ratios(partial(run, ALONE), actions, settings.repetitions)["together"]
            name = f"digits MLP, {threads} thread{'s' * (threads > 1)}"
            speedups[name] = [TOGETHER / ALONE / time for time in times]
        torch.set_num_threads(1)
    return rows("fleet", speedups, f"models, {TOGETHER} at once, in the time of one alone")
