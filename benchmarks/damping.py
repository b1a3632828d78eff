"""The automatic damping against the best constant, and against the rule before it.

    python -m benchmarks.damping --out damping_output            # an hour on one core, most of it retraining
    python -m benchmarks.damping --out damping_output --quick    # one small task, under a minute

For each task, at one model and at ten: the constant damping with the highest linear datamodeling score (LDS), its LDS,
and the LDS of ``damping="auto"`` and of the former rule, k / (2 n_eff). With one model, each of the first three models
is measured, and their mean is taken.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.stores import featurize
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, quiet
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.projections import SparseProjection
from lightning_trak.scoring import TRAKScorer
from lightning_trak.scoring.damping import Damping
from lightning_trak.scoring.gram import DampedGram, gram_matrix
from lightning_trak.texts.tables import Table

SEEDS = 3
GRID = tuple(10 ** (power / 3) for power in range(-7, 8))  # of dampings, from 0.005 to 215
SINGLE = 3  # models that are measured one by one


@dataclass
class Result:
    """The dampings of a task at a number of models.

    Attributes:
        task: name of the task.
        models: number of models averaged.
        best: the constant damping with the highest LDS.
        best_lds: its LDS.
        former_lds: LDS of the former rule.
        auto_lds: LDS of "auto".
    """

    task: str
    models: int
    best: float
    best_lds: float
    former_lds: float
    auto_lds: float


def former_scores(store: FeatureStore, targets: list[Tensor]) -> Tensor:
    """Scores with the rule before, k / (2 n_eff), at each checkpoint."""
    total = torch.zeros(())
    for checkpoint, features in enumerate(targets):
        rows = Features.cat([store.read(checkpoint, shard) for shard in range(store.num_shards)])
        gram, squares = gram_matrix([rows], "gauss_newton", features.shape[1], torch.device("cpu"))
        damping = float(len(gram) * squares / (2 * gram.trace().square()))
        solved = DampedGram(gram, damping, rows.features.dtype, "a model").solve(features)
        total = total + solved @ rows.features.T * rows.loss_gradients
    return total


def measure(task: Task, states: list[dict[str, Tensor]], truth: Truth, directory: Path) -> Tensor:
    """LDS of each constant of the grid, of the former rule, and of "auto"."""
    store, rows = featurize(task, states, SparseProjection(), directory)

    def lds(scores: Tensor) -> float:
        return float(truth.measure(scores).compute())

    def at(damping: Damping) -> float:
        scorer = TRAKScorer(store, "gauss_newton", damping, "per_checkpoint", 0.0)
        scorer.fit(torch.device("cpu"))
        scores = scorer.score([scorer.precondition(checkpoint, part) for checkpoint, part in enumerate(rows)])
        assert isinstance(scores, Tensor)
        return lds(scores)

    return torch.tensor([*map(at, GRID), lds(former_scores(store, rows)), at("auto")])


def results_of(task: Task, truth: Truth) -> Iterator[Result]:
    """At one model, averaged over the first few, and at all."""
    singles = [[state] for state in truth.states[:SINGLE]]
    for chosen in (singles, [truth.states]):
        with tempfile.TemporaryDirectory() as directory:
            measured = [measure(task, states, truth, Path(directory) / str(i)) for i, states in enumerate(chosen)]
        *grid, former, auto = torch.stack(measured).mean(0).tolist()
        best = max(range(len(GRID)), key=lambda number: grid[number])
        yield Result(task.name, len(chosen[0]), GRID[best], grid[best], former, auto)


def table(results: list[Result]) -> str:
    """Markdown."""
    columns = ("task", "M", "best constant", "its LDS", "former rule", "auto", "former / best", "auto / best")
    rows = []
    for r in results:
        lds = [f"{value:.3f}" for value in (r.best_lds, r.former_lds, r.auto_lds)]
        shares = [f"{value / r.best_lds:.3f}" for value in (r.former_lds, r.auto_lds)]
        rows.append((r.task, r.models, f"{r.best:.3g}", *lds, *shares))
    return Table(columns, rows).markdown() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    tasks = make_tasks()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("damping_output"), help="where everything is written")
    parser.add_argument("--tasks", nargs="+", choices=tasks, help="tasks; default: all, or one with --quick")
    parser.add_argument("--quick", action="store_true", help="20 halves once, 2 models")
    args = parser.parse_args(arguments)
    quiet()
    args.out.mkdir(parents=True, exist_ok=True)
    wide = (20, 1, 2) if args.quick else (SUBSETS, SEEDS, MODELS)
    results: list[Result] = []
    for name in tqdm(args.tasks or (["diabetes"] if args.quick else list(tasks))):
        results += results_of(tasks[name], kept(args.out, tasks[name], *wide))
        (args.out / "damping.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
        (args.out / "damping.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
