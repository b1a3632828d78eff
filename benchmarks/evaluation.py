"""What moves the linear datamodeling score (LDS)? Subsets, seeds, targets, and the method.

    python -m benchmarks.evaluation --out evaluation_output            # less than a minute on one core
    python -m benchmarks.evaluation --out evaluation_output --quick    # a tiny net, 200 digits, 20 halves

The perceptron for handwritten digits is trained five times on all data, and three times on each of 100 random halves.
The directory gets `evaluation.md`, the two tables of docs/evaluation.md. It also keeps the truth.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.command_line import begin, options
from benchmarks.methods import small
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import SUBSETS, Truth, kept, trainer_for
from lightning_trak import TRAK, GradientCosine
from lightning_trak.methods import RandomScores, RepresentationSimilarity
from lightning_trak.texts.tables import Table

SEEDS, MODELS = 3, 5
PARTS = ((297, 20, 1), (297, 50, 1), (297, 100, 1), (297, 100, 2), (297, 33, 3), (297, 100, 3), (50, 100, 3))
BEST = f"TRAK, {MODELS} runs"


def scores_of(task: Task, states: list[dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The scores of each method, (num_targets, num_train)."""
    model, trainer = task.make_module(), trainer_for(task)
    train, targets = DataLoader(task.train, batch_size=task.batch_size), DataLoader(task.targets, batch_size=100)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        methods = {
            BEST: TRAK(model, states, store / "all"),
            "the same, curvature identity": TRAK(model, states, store / "all", curvature="identity"),
            "the same, damping 1": TRAK(model, states, store / "all", damping=1.0),
            "the same, damping 100": TRAK(model, states, store / "all", damping=100.0),
            "TRAK, one run": TRAK(model, states[:1], store / "one"),
            f"GradientCosine, {MODELS} runs": GradientCosine(model, states, store / "all"),
            f"RepresentationSimilarity, {MODELS} runs": RepresentationSimilarity(model, states),
            "RandomScores": RandomScores(),
        }
        for name, method in methods.items():
            yield name, method.attribute(trainer, train, targets)


def measured(truth: Truth, scores: Tensor) -> tuple[str, str, str]:
    """LDS, interval and ceiling, as cells of a table."""
    lds = truth.measure(scores)
    low, high = lds.interval()
    ceiling = f"{lds.noise_ceiling():.2f}" if truth.outputs.shape[2] > 1 else ""
    return f"{lds.compute():.3f}", f"{low:.3f} to {high:.3f}", ceiling


def by_size(truth: Truth, scores: Tensor) -> Table:
    """The LDS of one method against parts of the truth."""
    rows = []
    for targets, subsets, seeds in PARTS:
        outputs = truth.outputs[:targets, :subsets, :seeds]
        found = measured(replace(truth, masks=truth.masks[:subsets], outputs=outputs), scores[:targets])
        rows.append((*outputs.shape, *found, outputs.shape[1] * outputs.shape[2]))
    return Table(("targets", "subsets", "seeds", "LDS", "95% interval", "ceiling", "half trainings"), rows)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    args = begin(options(__doc__, "evaluation_output", quick="a tiny net, 200 digits, 20 halves"), arguments)
    task = make_tasks()["digits MLP"]
    task = small(task) if args.quick else task
    truth = kept(args.out, task, 20 if args.quick else SUBSETS, SEEDS, MODELS)
    scores = dict(scores_of(task, truth.states))
    by_method = Table(("", "LDS", "95% interval"), [(name, *measured(truth, s)[:2]) for name, s in scores.items()])
    text = f"{by_size(truth, scores[BEST]).markdown()}\n\n{by_method.markdown()}\n"
    (args.out / "evaluation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
