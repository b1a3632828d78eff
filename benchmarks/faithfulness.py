"""Linear datamodeling score of every setting: projection, k, curvature, damping and number of models.

    python -m benchmarks.faithfulness --out faithfulness_output            # about 20 minutes on two cores
    python -m benchmarks.faithfulness --out faithfulness_output --quick    # two tasks, few settings, under a minute

For each task, ten models are trained on all data. Their features give the scores. Models are retrained on 100 random
halves, with three seeds each. Their outputs are the truth. Everything is written to the directory: `faithfulness.json`,
`faithfulness.md` (the tables) and `faithfulness.png`.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from benchmarks.command_line import begin, options
from benchmarks.stores import featurize
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, retrain
from lightning_trak.projections import (
    GaussianProjection,
    KroneckerProjection,
    Projection,
    RademacherProjection,
    SparseProjection,
)
from lightning_trak.scoring import smaller_scorer
from lightning_trak.scoring.damping import Damping
from lightning_trak.scoring.newton.gram import Curvature
from lightning_trak.scoring.newton.temperature import tempered

SEEDS = 3
GRID: tuple[float, ...] = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
SWEPT = ("digits MLP", "digits conv")  # with every projection; the other tasks with SWEEP_LESS
PROJECTIONS: dict[str, Projection] = {
    "sparse 256": SparseProjection(256),
    "sparse 1024": SparseProjection(1024),
    "sparse 2048": SparseProjection(2048),
    "Gaussian 1024": GaussianProjection(1024),
    "Rademacher 1024": RademacherProjection(1024),
    "Kronecker 8 x 8": KroneckerProjection(8, 8),
    "Kronecker 16 x 16": KroneckerProjection(16, 16),
    "Kronecker 32 x 32": KroneckerProjection(32, 32),
    "principal 8 x 8": KroneckerProjection(8, 8, axes="principal"),
    "principal 16 x 16": KroneckerProjection(16, 16, axes="principal"),
}
SWEEP_LESS = ("sparse 1024", "Kronecker 16 x 16")


@dataclass
class Result:
    """One setting on one task.

    Attributes:
        task: name of the task.
        projection: name of the projection.
        k: features of an example.
        curvature: curvature of the Gram matrix, "gauss_newton" or "identity".
        damping: relative to the mean eigenvalue of the Gram matrix, or "auto".
        models: number of models averaged.
        lds: mean over targets.
        low: lower end of the 95% interval over targets and subsets.
        high: upper end.
    """

    task: str
    projection: str
    k: int
    curvature: Curvature
    damping: Damping
    models: int
    lds: float
    low: float
    high: float


def sweep(
    task: Task, truth: Truth, name: str, curvatures: tuple[Curvature, ...], counts: tuple[int, ...], directory: Path
) -> Iterator[Result]:
    """The LDS of a projection at every damping, from one set of features."""
    for count in counts:  # the automatic damping and temperature depend on the number of models
        store, features = featurize(task, truth.states[:count], PROJECTIONS[name], directory / str(count))
        kind = smaller_scorer(store)
        for curvature in curvatures:
            for damping in (*GRID, "auto"):
                temperature = tempered(task.output, None, damping, "per_checkpoint")
                scorer = kind(store, curvature, damping, "per_checkpoint", 0.0, tempered=temperature)
                scorer.fit(torch.device("cpu"))
                directions = [scorer.precondition(checkpoint, rows) for checkpoint, rows in enumerate(features)]
                lds = truth.measure(scorer.score(directions))
                row = (task.name, name, features[0].shape[1], curvature, damping, count)
                yield Result(*row, float(lds.compute()), *map(float, lds.interval(num_bootstraps=300)))


def tables(results: list[Result]) -> str:
    """Markdown: every grid, and the LDS of the automatic damping, also as a fraction of the best."""
    heads = [f"{damping:g}" for damping in GRID]
    lines = [
        f"| task | projection | k | curvature | M | {' | '.join(heads)} | ± | auto | auto / best |",
        "|---" * (8 + len(GRID)) + "|",
    ]
    settings: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        key = (result.task, result.projection, result.k, result.curvature, result.models)
        settings.setdefault(key, []).append(result)
    for key, (*grid, auto) in settings.items():
        best = max(grid, key=lambda result: result.lds)
        cells = [f"**{result.lds:.3f}**" if result is best else f"{result.lds:.3f}" for result in grid]
        cells += [f"{(best.high - best.low) / 2:.3f}", f"{auto.lds:.3f}", f"{auto.lds / best.lds:.2f}"]
        lines.append(f"| {' | '.join([*map(str, key), *cells])} |")
    return "\n".join(lines) + "\n"


def plot(results: list[Result], path: Path) -> None:
    """LDS against damping: a row for each number of models, a column for each task, a line for each projection."""
    gauss_newton = [result for result in results if result.curvature == "gauss_newton"]
    tasks = list(dict.fromkeys(result.task for result in gauss_newton))
    counts = sorted({result.models for result in gauss_newton})
    names = list(dict.fromkeys(result.projection for result in gauss_newton))
    figure, axes = plt.subplots(
        len(counts), len(tasks), figsize=(3.3 * len(tasks), 3.2 * len(counts)), squeeze=False, sharex=True, sharey="col"
    )
    for row, count in enumerate(counts):
        for column, task in enumerate(tasks):
            axis = axes[row][column]
            for number, name in enumerate(names):
                line = [r for r in gauss_newton if (r.task, r.models, r.projection) == (task, count, name)]
                grid = [r for r in line if r.damping != "auto"]
                if not grid:
                    continue
                style = "--" if name.startswith(("Kronecker", "principal")) else "-"
                x = [float(r.damping) for r in grid]
                axis.plot(x, [r.lds for r in grid], style, color=f"C{number}", label=name)
                axis.fill_between(x, [r.low for r in grid], [r.high for r in grid], color=f"C{number}", alpha=0.06)
                axis.axhline(line[-1].lds, color=f"C{number}", linewidth=0.6, linestyle=":")
            axis.set_xscale("log")
            axis.set_title(f"{task}, M = {count}", fontsize=10)
            axis.grid(alpha=0.3)
            if row == len(counts) - 1:
                axis.set_xlabel("damping (dotted: auto)")
        axes[row][0].set_ylabel("LDS")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda pair: len(pair[0]))
    figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    tasks = make_tasks()
    parser = options(__doc__, "faithfulness_output", quick="one projection, 20 halves once")
    parser.add_argument("--tasks", nargs="+", choices=tasks, help="tasks; default: all, or two with --quick")
    args = begin(parser, arguments, one_thread=False)
    subsets, seeds = (20, 1) if args.quick else (SUBSETS, SEEDS)
    results: list[Result] = []
    for name in args.tasks or (("cancer", "diabetes") if args.quick else tasks):
        task = tasks[name]
        truth = retrain(task, subsets, seeds)
        swept = name in SWEPT and not args.quick
        for projection in tqdm(PROJECTIONS if swept else SWEEP_LESS[: 1 if args.quick else None], name):
            curvatures: tuple[Curvature, ...] = ("gauss_newton", "identity") if swept else ("gauss_newton",)
            with tempfile.TemporaryDirectory() as directory:
                results += sweep(task, truth, projection, curvatures, (1, MODELS), Path(directory))
            (args.out / "faithfulness.json").write_text(json.dumps([asdict(r) for r in results], indent=1))
    (args.out / "faithfulness.md").write_text(tables(results))
    plot(results, args.out / "faithfulness.png")
    print(tables(results))


if __name__ == "__main__":
    main()
