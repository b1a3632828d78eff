"""How much faster small models are retrained at once than one after another."""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
    found = []
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

        for threads in (1, 2):
            with _threads(threads):
                actions = {"": lambda: run(ALONE)}
                (times,) = ratios(lambda: run(TOGETHER, TOGETHER), actions, settings.repetitions).values()
            speedups = {f"digits MLP, {threads} threads": [time * TOGETHER / ALONE for time in times]}
            found += rows("fleet", speedups, f"models, {TOGETHER} at once, in the time of one by one")
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
