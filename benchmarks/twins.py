"""Which run to attribute? LDS of attributions at smooth twins and at shorter runs, against those at originals.

    python -m benchmarks.twins --out twins_output            # a quarter of an hour on one core
    python -m benchmarks.twins --out twins_output --quick    # a tiny net, 200 digits, 20 halves

The truth is the outputs of models retrained on random halves as the original is trained: with its learning rates and
its number of epochs, which are half as many steps.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.command_line import begin, difference, options, save
from benchmarks.methods import small
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, trainer_for
from lightning_trak import TRAK
from lightning_trak.methods import ExactKernel
from lightning_trak.retraining import train_together

TASKS = ("digits MLP", "digits no decay", "written digits", "cancer", "photographs MLP", "photographs conv")
RUNS = {  # factor of the learning rates, and of the number of epochs
    "lr x 0.3": (0.3, 1),
    "lr x 0.1": (0.1, 1),
    "lr x 0.1, 3 x the epochs": (0.1, 3),
    "lr x 0.1, 10 x the epochs": (0.1, 10),
    "half the epochs": (1, 0.5),
}
FIRST_SEED = 20_000  # not those of the truth
COUNT = 5  # models of each run


@dataclass
class Result:
    """One line of the table.

    Attributes:
        task: name of the task.
        run: how the attributed models were trained.
        models: how many of them scores are averaged over.
        loss: the training loss of one of them.
        lds: mean over targets.
        gain: the LDS minus that at all originals.
        low: lower end of the 95% interval of the gain, over targets and halves.
        high: upper end.
    """

    task: str
    run: str
    models: int
    loss: float
    lds: float
    gain: float
    low: float
    high: float


def twin(task: Task, factor: float) -> L.LightningModule:
    """A new module whose learning rates are multiplied, as by ``SmoothTwin``, which needs a Trainer."""
    module: Any = task.make_module()
    original = module.configure_optimizers

    def configure_optimizers() -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = original()
        for group in optimizer.param_groups:
            group["lr"] *= factor
        return optimizer

    module.configure_optimizers = configure_optimizers
    return module  # type: ignore[no-any-return]


def train_twins(task: Task, factor: float, epochs: float, count: int) -> list[dict[str, Tensor]]:
    """State dicts of several twins."""
    return train_together(
        lambda: twin(task, factor),
        task.train,
        torch.ones(count, len(task.train), dtype=torch.bool),
        range(FIRST_SEED, FIRST_SEED + count),
        max_epochs=round(epochs * task.max_epochs),
        batch_size=task.batch_size,
    ).state_dicts()


def scores_at(task: Task, states: list[dict[str, Tensor]]) -> Tensor:
    """Scores of the training set: exact, or TRAK's for convolutions."""
    kind: Any = TRAK if "conv" in task.name else ExactKernel
    with tempfile.TemporaryDirectory() as store:
        method = kind(task.make_module().eval(), states, store, output=task.output, lag=1)
        found: Tensor = method.attribute(trainer_for(task), DataLoader(task.train, 100), DataLoader(task.targets, 100))
        return found


def training_loss(task: Task, state: dict[str, Tensor]) -> float:
    """The loss of a model on the whole training set."""
    module: Any = task.make_module()
    module.load_state_dict(state)
    with torch.no_grad():
        return float(module.eval().training_step(list(task.train.tensors)))


def results(task: Task, truth: Truth, count: int) -> Iterator[Result]:
    """The originals, then all other runs."""
    runs = {"original": truth.states}
    base = scores_at(task, truth.states)
    for name, (factor, epochs) in RUNS.items():
        runs[name] = train_twins(task, factor, epochs, count)
    for name, states in runs.items():
        for models in sorted({1, min(count, len(states)), len(states)}):
            scores = base if states is truth.states and models == len(states) else scores_at(task, states[:models])
            lds = float(truth.measure(scores).compute())
            yield Result(task.name, name, models, training_loss(task, states[0]), lds, *truth.difference(scores, base))


def table(found: list[Result]) -> str:
    """Markdown."""
    lines = ["| task | run | models | training loss | LDS | minus all originals (95%) |", "|---" * 6 + "|"]
    for row in found:
        gain = difference(row.gain, row.low, row.high)
        lines.append(f"| {row.task} | {row.run} | {row.models} | {row.loss:.4f} | {row.lds:.3f} | {gain} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "twins_output", quick="a tiny net, 200 digits, 20 halves")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="tasks")
    args = begin(parser, arguments)
    found: list[Result] = []
    for name in args.tasks[:1] if args.quick else args.tasks:
        task = small(make_tasks()[name]) if args.quick else make_tasks()[name]
        truth = kept(args.out, task, *((20, 2, 2) if args.quick else (SUBSETS, 3, MODELS)))
        for result in results(task, truth, 2 if args.quick else COUNT):
            found.append(result)
            save(found, args.out / "twins", table)


if __name__ == "__main__":
    main()
