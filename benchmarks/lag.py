"""Short and gentle trainings: what the lag of the training does for scores.

    python -m benchmarks.lag --out lag_output            # about ten minutes on one core, half of it retraining
    python -m benchmarks.lag --out lag_output --quick    # one small task, under a minute

Each setting trains a task with a fraction of the learning rate, other numbers of epochs, or random labels. The truth is
the outputs of models retrained on random halves in the same way. Exact Gauss-Newton scores have ``lag=1`` or the
measured lag. With one model, each model is measured, and the mean is taken.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from benchmarks.command_line import begin, options, save
from benchmarks.methods import small
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import SUBSETS, Truth, kept, trainer_for
from benchmarks.twins import twin
from lightning_trak.methods import ExactKernel
from lightning_trak.scoring.newton.lag import Lag
from lightning_trak.texts.tables import Table

MODELS, SEEDS = 4, 2
SETTINGS = [  # task, factor of the learning rates, of the number of epochs, share of labels that are random
    ("digits MLP", 1.0, 1.0, 0.0),
    ("digits MLP", 0.3, 3.0, 0.0),
    ("digits MLP", 0.3, 1.0, 0.0),
    ("digits MLP", 0.1, 3.0, 0.0),
    ("digits MLP", 0.1, 1.0, 0.0),
    ("digits MLP", 0.03, 1.0, 0.0),
    ("digits MLP", 1.0, 1.0, 0.3),
    ("digits MLP", 0.3, 1.0, 0.3),
    ("digits MLP", 0.1, 1.0, 0.3),
    ("digits no decay", 1.0, 1.0, 0.0),
    ("digits no decay", 0.1, 1.0, 0.0),
    ("digits no decay", 0.03, 1.0, 0.0),
    ("cancer", 0.3, 1.0, 0.0),
    ("cancer", 0.1, 1.0, 0.0),
    ("diabetes", 0.1, 1.0, 0.0),
]


@dataclass
class Result:
    """One line of the table.

    Attributes:
        task: name of the task.
        factor: of the learning rates.
        epochs: factor of the number of epochs.
        random_labels: the share of them.
        lag: the smallest and the largest that was measured.
        models: number of models averaged.
        without: LDS with ``lag=1``.
        measured: LDS with the measured lag.
    """

    task: str
    factor: float
    epochs: float
    random_labels: float
    lag: tuple[float, float]
    models: int
    without: float
    measured: float


def trained_so(task: Task, factor: float, epochs: float, random_labels: float) -> Task:
    """The task, trained in another way."""
    inputs, labels = task.train.tensors
    if random_labels:
        generator = torch.Generator().manual_seed(5)
        chosen = torch.rand(len(labels), generator=generator) < random_labels
        drawn = torch.randint(int(labels.max()) + 1, labels.shape, generator=generator)
        labels = torch.where(chosen, drawn, labels)
    return replace(
        task,
        name=f"{task.name} {factor} {epochs} {random_labels}",
        make_module=partial(twin, task, factor),
        train=TensorDataset(inputs, labels),
        max_epochs=round(epochs * task.max_epochs),
    )


class Measured:
    """Exact Gauss-Newton scores of some models."""

    def __init__(self, task: Task, states: list[dict[str, torch.Tensor]], truth: Truth, directory: Path) -> None:
        self.truth, self.trainer, self.targets = truth, trainer_for(task), DataLoader(task.targets, 100)
        module = task.make_module().eval()
        self.method = ExactKernel(module, states, directory, output=task.output)
        self.method.featurize(self.trainer, DataLoader(task.train, 100))
        scorer = self.method.make_scorer(self.method.open_store(self.trainer))
        scorer.fit(torch.device("cpu"))
        assert scorer.noise is not None
        self.lags = scorer.noise.lags

    def lds(self, lag: Lag) -> float:
        """With this lag."""
        self.method.lag = lag
        return float(self.truth.measure(self.method.score(self.trainer, self.targets)).compute())


def results_of(setting: tuple[str, float, float, float], task: Task, truth: Truth) -> Iterator[Result]:
    """At one model, averaged over all, and at all together."""
    for chosen in ([[state] for state in truth.states], [truth.states]):
        with tempfile.TemporaryDirectory() as directory:
            found = [Measured(task, states, truth, Path(directory) / str(i)) for i, states in enumerate(chosen)]

            lags = [lag for one in found for lag in one.lags]
            without, measured = (sum(one.lds(lag) for one in found) / len(found) for lag in (1.0, "auto"))
            yield Result(*setting, (min(lags), max(lags)), len(chosen[0]), without, measured)


def table(results: list[Result]) -> str:
    """Markdown."""
    columns = "task", "learning rate", "epochs", "random labels", "lag", "M", "lag=1", "measured lag"
    rows = []
    for r in results:
        lag = " to ".join(dict.fromkeys(f"{value:.2g}" for value in r.lag))
        lds = [f"{value:.3f}" for value in (r.without, r.measured)]
        how = f"x {r.factor:g}", f"x {r.epochs:g}", f"{r.random_labels:.0%}"
        rows.append((r.task, *how, lag, r.models, *lds))
    return Table(columns, rows).markdown() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "lag_output", quick="a tiny net at two learning rates, 20 halves, 2 models")
    args = begin(parser, arguments)
    results: list[Result] = []
    for name, *how in tqdm(SETTINGS[:2] if args.quick else SETTINGS):
        task = make_tasks()[name]
        task = trained_so(small(task) if args.quick else task, *how)
        truth = kept(args.out, task, *((20, 1, 2) if args.quick else (SUBSETS, SEEDS, MODELS)))
        for result in results_of((name, *how), task, truth):
            results.append(result)
            save(results, args.out / "lag", table)


if __name__ == "__main__":
    main()
