"""Which part of a run says what models of half the data do? LDS of metagradients of a whole run, and of its first half.

    python -m benchmarks.first_half --out first_half_output            # about half an hour on one core
    python -m benchmarks.first_half --out first_half_output --quick    # one task, few retrained models

The truth is the outputs of models retrained on random halves, for as many epochs as the recorded runs: half as many
steps. The tasks are those of `benchmarks.other_seeds` whose runs are trained as the models of the truth, and the short
and gentle trainings of `benchmarks.lag`. The directory gets `first_half.json` and `first_half.md`.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import lag, other_seeds, tasks
from benchmarks.command_line import begin, difference, options, save
from benchmarks.one_run import fit
from benchmarks.other_seeds import FIRST_SEED, TARGETS, Result, Setting, gained, label
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, trainer_for
from lightning_trak import Metagradient
from lightning_trak.outputs import RegressionOutput
from lightning_trak.scoring import combine_runs, combine_scores
from lightning_trak.texts.tables import Table

KERNEL = "Gauss-Newton"
WHOLE, WHOLE_END = "whole run", "the last tenth"
HALF, HALF_END = "first half", "the last tenth of the first half"
COMBINED_WHOLE, COMBINED = "combined, whole run", "combined"
METHODS = (KERNEL, WHOLE, HALF, COMBINED_WHOLE, COMBINED)


def make_settings() -> list[tuple[Setting, int]]:
    """All lines of the table, each with the number of models of the truth that are trained on all data."""
    known = [(setting, MODELS) for setting in other_seeds.make_settings() if setting.run is setting.task]
    made = tasks.make_tasks()
    gentle = []
    for name, factor, epochs, random_labels in lag.SETTINGS:
        how = [f"rate x {factor:g}", f"{epochs:g} x the epochs"][: 1 if epochs == 1 else 2]
        how += [f"{random_labels:.0%} random labels"] if random_labels else []
        task = lag.trained_so(made[name], factor, epochs, random_labels)
        if (factor, random_labels) != (1, 0):
            gentle.append((Setting(", ".join([name, *how]), task, lag.SEEDS, 2), lag.MODELS))
    return known + gentle


def squared_errors(module: nn.Module, batch: Any) -> Tensor:
    """The loss of each example of a regression."""
    return (module(batch[0]) - batch[1]).square()


def scores_of(setting: Setting, number: int) -> dict[str, Tensor]:
    """The scores of one run by all methods that take one."""
    task = setting.task
    targets = TensorDataset(*(part[:TARGETS] for part in task.targets.tensors))
    with tempfile.TemporaryDirectory() as folder:
        module = fit(task, FIRST_SEED + number, Path(folder))
        loader, trainer = DataLoader(task.train, batch_size=task.batch_size), trainer_for(task)
        steps = task.max_epochs * len(loader)
        half = round(task.max_epochs / 2) * len(loader)
        parts: dict[str, dict[str, Any]] = {
            WHOLE: {},
            WHOLE_END: {"last_steps": max(1, round(steps / 10))},
            HALF: {"first_steps": half},
            HALF_END: {"first_steps": half, "last_steps": max(1, round(half / 10))},
        }
        options: dict[str, Any] = {"order": "average", "check_smooth": False, "progress_bar": False}
        options["losses"] = squared_errors if isinstance(task.output, RegressionOutput) else None
        found = {
            name: Metagradient(module, folder, output=task.output, **options, **part).attribute(
                trainer, loader, DataLoader(targets, batch_size=TARGETS)
            )
            for name, part in parts.items()
        }
    return found | {KERNEL: other_seeds.kernel(task, [module.state_dict()])}


def results(setting: Setting, truth: Truth, runs: Sequence[dict[str, Tensor]]) -> Iterator[Result]:
    """The mean of single runs, then all runs together."""
    for own in runs:
        own[COMBINED_WHOLE] = combine_scores(own[KERNEL], own[WHOLE])
        own[COMBINED] = combine_scores(own[KERNEL], own[HALF])
    yield measured(setting, truth, runs, 1)
    together = {name: torch.stack([own[name] for own in runs]).mean(0) for name in (KERNEL, WHOLE, HALF)}
    for name, methods in ((COMBINED_WHOLE, (WHOLE, WHOLE_END, KERNEL)), (COMBINED, (HALF, HALF_END, KERNEL))):
        together[name] = combine_runs(*([own[method] for own in runs] for method in methods))
    yield measured(setting, truth, [together], len(runs))


def measured(setting: Setting, truth: Truth, scores: Sequence[dict[str, Tensor]], runs: int) -> Result:
    """A line of the table: means over repeats."""
    found = {name: torch.stack([truth.table(own[name]) for own in scores]).mean(0) for name in METHODS}
    gain = {COMBINED: gained(found[COMBINED], found[KERNEL])}
    ceiling = float(truth.measure(scores[0][KERNEL]).noise_ceiling())
    lds = {name: float(table.mean()) for name, table in found.items()}
    return Result(setting.name, setting.seeds, runs, len(scores), ceiling, lds, gain)


def table(found: list[Result]) -> str:
    """Markdown."""
    rows = [
        (label(row), *(f"{row.lds[method]:.3f}" for method in METHODS), difference(*row.gain[COMBINED]))
        for row in found
    ]
    return Table(("task (runs; models of each half, ceiling)", *METHODS, "gain"), rows).markdown() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "first_half_output", quick="one perceptron alone, few retrained models")
    args = begin(parser, arguments)
    settings = make_settings()
    if args.quick:
        mlp = next(setting for setting, _ in settings if setting.task.name == "MLP")
        settings = [(replace(mlp, seeds=2, runs=2, task=replace(mlp.task, max_epochs=2)), 2)]
    found: list[Result] = []
    for setting, models in settings:
        truth = kept(args.out, setting.task, 10 if args.quick else SUBSETS, setting.seeds, models)
        truth = replace(truth, outputs=truth.outputs[:TARGETS])
        for result in results(setting, truth, [scores_of(setting, number) for number in range(setting.runs)]):
            found.append(result)
            save(found, args.out / "first_half", table)


if __name__ == "__main__":
    main()
