"""What does a recorded run say of models with other seeds? LDS of metagradients and of Gauss-Newton scores.

    python -m benchmarks.other_seeds --out other_seeds_output            # some twenty minutes on one core
    python -m benchmarks.other_seeds --out other_seeds_output --quick    # one task, few retrained models

The truth is the outputs of models retrained on random halves as the original is trained, with several seeds for each
half. The recorded runs have seeds of their own. Some are smooth twins: a fraction of the learning rate, and perhaps
more epochs. The directory gets `other_seeds.json` and `other_seeds.md`.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import one_run, tasks
from benchmarks.command_line import begin, difference, options, save
from benchmarks.one_run import SmoothConvNet, SmoothMLP, image_losses
from benchmarks.tasks import Task
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, trainer_for
from benchmarks.twins import twin
from lightning_trak import Metagradient
from lightning_trak.methods import ExactKernel
from lightning_trak.metrics.functional.bootstrap import crossed_bootstrap_interval
from lightning_trak.scoring import combine_runs, combine_scores
from lightning_trak.scoring.newton.lag import Lag

TARGETS = 50
FIRST_SEED = 500  # of the recorded runs
RECORDED, AVERAGE, LAST = "recorded", "average order", "last tenth"
KERNEL, UNHEATED = "Gauss-Newton", "Gauss-Newton, T = 1"
MEAN = "mean of Gauss-Newton"  # scores of single models, each with the temperature of one
COMBINED, RUNS = "combined", "combined over runs"
METHODS = (RECORDED, AVERAGE, LAST, UNHEATED, KERNEL, COMBINED, MEAN, RUNS)


class RoughMLP(SmoothMLP):
    """The perceptron with ten times the learning rate: its training is not smooth."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class NormalizedConvNet(SmoothConvNet):
    """The convolutional net with a normalization after each convolution.

    Args:
        normalization: makes it, for a number of channels.
        learning_rate: of SGD with momentum.
    """

    def __init__(self, normalization: Callable[[int], nn.Module], learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        first, second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        layers = first, normalization(8), nn.ReLU(), second, normalization(16), nn.ReLU()
        self.net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


@dataclass(frozen=True)
class Setting:
    """A task, and how its recorded runs are trained.

    Attributes:
        name: of the line in the table.
        task: the task of the truth. Of its targets the first :data:`TARGETS` are attributed.
        seeds: models of each half.
        runs: how many runs are recorded.
        factor: of the learning rates of recorded runs.
        epochs: factor of their number of epochs.
    """

    name: str
    task: Task
    seeds: int
    runs: int
    factor: float = 1
    epochs: float = 1

    @property
    def lag(self) -> Lag:
        """Of the recorded runs for the truth: twins are trained more gently than its models."""
        return 1.0 if self.factor < 1 else "auto"

    @property
    def run(self) -> Task:
        """The task of recorded runs."""
        if self.factor == self.epochs == 1:
            return self.task
        return replace(
            self.task,
            make_module=partial(twin, self.task, self.factor),
            max_epochs=round(self.epochs * self.task.max_epochs),
        )


def make_settings() -> list[Setting]:
    """All lines of the table."""
    digits, written, photographs = (
        tasks.make_tasks()[name] for name in ("digits MLP", "written digits", "photographs MLP")
    )
    mlp, conv, *_ = (task for task, _ in one_run.make_tasks(TARGETS))
    rough = replace(mlp, name="rough MLP", make_module=RoughMLP)
    batch_norm, group_norm = partial(NormalizedConvNet, nn.BatchNorm2d, 0.01), partial(nn.GroupNorm, 4)
    batches = replace(conv, name="BatchNorm net", make_module=batch_norm, max_epochs=30)
    groups = replace(conv, name="GroupNorm net", make_module=partial(NormalizedConvNet, group_norm, 0.02))
    return [
        Setting("digits, a third of the rate", digits, 10, 4, 0.3),
        Setting("digits, a tenth of the rate, 3 x the epochs", digits, 10, 2, 0.1, 3),
        Setting("digits, the original's rate: not smooth", digits, 10, 2),
        Setting("convolutional net of this page", conv, 10, 2),
        Setting("MLP of this page", mlp, 10, 4),
        Setting("this MLP at ten times the rate: not smooth", rough, 10, 4),
        Setting("the net with batch normalization, 30 epochs", batches, 3, 2),
        Setting("the net with group normalization, twice the rate", groups, 3, 2),
        Setting("written digits, a third of the rate", written, 3, 2, 0.3),
        Setting("photographs, perceptron, a third of the rate", photographs, 3, 2, 0.3),
    ]


def _targets(task: Task) -> TensorDataset:
    return TensorDataset(*(part[:TARGETS] for part in task.targets.tensors))


@dataclass
class Result:
    """One line of the table.

    Attributes:
        setting: its name.
        seeds: models of each half.
        runs: how many runs the scores are of.
        repeats: how many such lines it is the mean of.
        ceiling: the LDS that a perfect method can be expected to have.
        lds: by method, means over targets.
        gain: by method: the LDS minus that of Gauss-Newton scores of the same runs, with the ends of its 95% interval
            over targets and halves.
    """

    setting: str
    seeds: int
    runs: int
    repeats: int
    ceiling: float
    lds: dict[str, float]
    gain: dict[str, tuple[float, float, float]]


def recorded(setting: Setting, number: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Metagradients of a run, by method, and its state at the end."""
    run = setting.run
    module = one_run.fit(run, FIRST_SEED + number, folder)
    loader, targets = DataLoader(run.train, batch_size=run.batch_size), DataLoader(_targets(run), batch_size=TARGETS)
    tenth = round(run.max_epochs * len(loader) / 10)
    kinds: dict[str, dict[str, Any]] = {
        RECORDED: {},
        AVERAGE: {"order": "average"},
        LAST: {"order": "average", "last_steps": tenth},
    }
    found = {}
    for name, kind in kinds.items():
        options = {"output": run.output, "losses": image_losses, "check_smooth": False, "progress_bar": False}
        found[name] = Metagradient(module, folder, **options, **kind).attribute(trainer_for(run), loader, targets)
    return found, {name: tensor.clone() for name, tensor in module.state_dict().items()}


def kernel(task: Task, states: Sequence[dict[str, Tensor]], **options: Any) -> Tensor:
    """Exact Gauss-Newton scores."""
    loaders = DataLoader(task.train, 500), DataLoader(_targets(task), TARGETS)
    with tempfile.TemporaryDirectory() as store:
        method = ExactKernel(task.make_module().eval(), list(states), store, output=task.output, **options)
        found: Tensor = method.attribute(trainer_for(task), *loaders)
        return found


def results(setting: Setting, truth: Truth) -> Iterator[Result]:
    """The mean of single runs, then all runs together."""
    metagradients, states = [], []
    for number in range(setting.runs):
        with tempfile.TemporaryDirectory() as folder:
            found, state = recorded(setting, number, Path(folder))
        metagradients.append(found)
        states.append(state)
    solved = partial(kernel, setting.task, lag=setting.lag)
    single = [
        own | {KERNEL: solved([state]), UNHEATED: solved([state], temperature=1)}
        for own, state in zip(metagradients, states, strict=True)
    ]
    together = {name: torch.stack([own[name] for own in metagradients]).mean(0) for name in metagradients[0]}
    together |= {KERNEL: solved(states), UNHEATED: solved(states, temperature=1)}
    for own in (*single, together):
        own[COMBINED] = combine_scores(own[KERNEL], own[AVERAGE])
    together[MEAN] = torch.stack([own[KERNEL] for own in single]).mean(0)
    together[RUNS] = combine_runs(*([own[name] for own in single] for name in (AVERAGE, LAST, KERNEL)))
    yield measured(setting, truth, single, 1)
    yield measured(setting, truth, [together], setting.runs)


def measured(setting: Setting, truth: Truth, scores: Sequence[dict[str, Tensor]], runs: int) -> Result:
    """A line of the table: means over repeats."""
    tables = {name: torch.stack([truth.table(own[name]) for own in scores]).mean(0) for name in scores[0]}
    gain = {}
    for name in (COMBINED, RUNS):
        if name in tables:
            gain[name] = gained(tables[name], tables[KERNEL])
    ceiling = float(truth.measure(scores[0][KERNEL]).noise_ceiling())
    lds = {name: float(table.mean()) for name, table in tables.items()}
    return Result(setting.name, setting.seeds, runs, len(scores), ceiling, lds, gain)


def gained(scores: Tensor, others: Tensor) -> tuple[float, float, float]:
    """The mean difference of two tables of LDS, with the ends of its 95% interval over targets and halves."""
    apart = scores - others
    return float(apart.mean()), *map(float, crossed_bootstrap_interval(apart))


def table(found: list[Result]) -> str:
    """Markdown."""
    columns = "task (runs; models of each half, ceiling)", *METHODS[:-2], "gain", MEAN, RUNS, "gain"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in found:
        cells = [f"{row.lds[method]:.3f}" for method in METHODS[:-2]]
        cells += [difference(*row.gain[COMBINED])]
        more = [f"{row.lds[MEAN]:.3f}", f"{row.lds[RUNS]:.3f}", difference(*row.gain[RUNS])] if RUNS in row.lds else []
        cells += more or [""] * 3
        lines.append(f"| {label(row)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def label(row: Result) -> str:
    """The first cell of a line."""
    if row.runs > 1:
        return f"- {row.runs} runs together"
    return f"{row.setting} ({row.repeats}; {row.seeds}, {row.ceiling:.2f})"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "other_seeds_output", quick="the MLP alone, few retrained models")
    args = begin(parser, arguments)
    settings = make_settings()
    if args.quick:
        (mlp,) = (setting for setting in settings if setting.task.name == "MLP")
        settings = [replace(mlp, seeds=2, runs=2, task=replace(mlp.task, max_epochs=3))]
    found: list[Result] = []
    for setting in settings:
        truth = kept(args.out, setting.task, 10 if args.quick else SUBSETS, setting.seeds, MODELS)
        truth = replace(truth, outputs=truth.outputs[:TARGETS])
        for result in results(setting, truth):
            found.append(result)
            save(found, args.out / "other_seeds", table)


if __name__ == "__main__":
    main()
