"""Fleets as ensembles, and scores that learn from fleets: LDS at equal cost.

    python -m benchmarks.ensembles --out ensembles_output

Twenty models of random halves, each with the curvature of its own half, cost as much training as ten models of all
data. Both are measured on other halves. Then the scores of the ten models are corrected by what m retrained halves
say, :func:`~lightning_trak.retraining.informed_scores`, and measured on the halves that are left.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.command_line import begin, difference, options, save
from benchmarks.methods import small
from benchmarks.stores import featurize
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import SUBSETS, TOGETHER, Truth, kept
from lightning_trak.features.rows import Features
from lightning_trak.projections import SparseProjection
from lightning_trak.retraining import informed_scores, random_subsets, train_together
from lightning_trak.scoring.damping import auto_damping
from lightning_trak.scoring.newton.gram import DampedGram, gram_matrix

TASKS = ("digits MLP", "written digits")
SEEDS = {"digits MLP": 5}  # other tasks: 3 models of each half
FACTORS = (1.0, 0.3, 0.1)  # of the damping that "auto" chooses for one model
DRAWS = 5  # sets of m halves


@dataclass
class Result:
    """One line of the table.

    Attributes:
        task: name of the task.
        scores: what made the scores.
        lds: mean over targets, and over draws of m halves.
        baseline: the LDS of the scores that it is compared with, on the same halves.
        low: lower end of the 95% interval of the difference to the baseline, over targets and halves.
        high: upper end.
    """

    task: str
    scores: str
    lds: float
    baseline: float
    low: float
    high: float


def train_halves(task: Task, count: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Models of halves that the ground truth does not have: their masks and state dicts."""
    masks = random_subsets(len(task.train), count, seed=2)
    states: list[dict[str, Tensor]] = []
    for start in range(0, count, TOGETHER):
        part = masks[start : start + TOGETHER]
        seeds = range(10_000 + start, 10_000 + start + len(part))
        stack = train_together(
            task.make_module, task.train, part, seeds, max_epochs=task.max_epochs, batch_size=task.batch_size
        )
        states += stack.state_dicts()
    return masks, states


def trak_scores(task: Task, states: list[dict[str, Tensor]], masks: Tensor, k: int) -> dict[float, Tensor]:
    """TRAK's scores, averaged over models that have seen the examples of a mask each, for each factor of damping."""
    totals = dict.fromkeys(FACTORS, torch.zeros(()))
    with tempfile.TemporaryDirectory() as directory:
        store, targets = featurize(task, states, SparseProjection(k), Path(directory))
        for checkpoint, (features, seen) in enumerate(zip(targets, masks, strict=True)):
            rows = Features.cat([store.read(checkpoint, shard) for shard in range(store.num_shards)])
            own = Features(*(column[seen] for column in rows))
            gram, squared_weights = gram_matrix([own], "gauss_newton", features.shape[1], torch.device("cpu"))
            auto = auto_damping(gram.trace(), squared_weights, len(gram))
            for factor in FACTORS:
                solved = DampedGram(gram, auto * factor, torch.float32, "features").solve(features)
                totals[factor] = totals[factor] + solved @ rows.features.T * rows.loss_gradients / len(masks)
    return totals


def lds(truth: Truth, scores: Tensor) -> float:
    """The LDS of scores."""
    return float(truth.measure(scores).compute())


def ensembles(task: Task, truth: Truth, halves: tuple[Tensor, list[dict[str, Tensor]]], k: int) -> Iterator[Result]:
    """Halves against whole models, each with its best factor of damping; then the best of all, informed."""
    whole = trak_scores(task, truth.states, torch.ones(len(truth.states), len(task.train), dtype=torch.bool), k)
    found = trak_scores(task, halves[1], halves[0], k)
    baseline = max(whole.values(), key=lambda scores: lds(truth, scores))
    for name, dampings in ((f"{len(truth.states)} whole", whole), (f"{len(halves[0])} halves", found)):
        for factor, scores in dampings.items():
            _, low, high = truth.difference(scores, baseline)
            yield Result(task.name, f"{name}, auto x {factor:g}", lds(truth, scores), lds(truth, baseline), low, high)
    best = max(found.values(), key=lambda scores: lds(truth, scores))
    for name, scores in (("whole", baseline), ("halves", best)):
        yield from informed(task, truth, name, scores)


def informed(task: Task, truth: Truth, name: str, scores: Tensor) -> Iterator[Result]:
    """Scores that learn from m halves, measured on the others."""
    for m in (10, 20, 50):
        if m > len(truth.masks) // 2:
            continue
        rows: list[tuple[float, ...]] = []
        for draw in range(DRAWS):
            order = torch.randperm(len(truth.masks), generator=torch.Generator().manual_seed(draw))
            known, held_out = order[:m], order[m:]
            rest = Truth(truth.masks[held_out], truth.outputs[:, held_out], [])
            corrected = informed_scores(scores, truth.masks[known], truth.outputs[:, known])
            rows.append((lds(rest, corrected), lds(rest, scores), *rest.difference(corrected, scores)[1:]))
        yield Result(
            task.name, f"{name}, informed by {m}", *(sum(column) / DRAWS for column in zip(*rows, strict=True))
        )


def table(found: Sequence[Result]) -> str:
    """Markdown."""
    lines = ["| task | scores | LDS | compared with | difference (95%) |", "|---|---|---|---|---|"]
    for result in found:
        gain = difference(result.lds - result.baseline, result.low, result.high)
        lines.append(f"| {result.task} | {result.scores} | {result.lds:.3f} | {result.baseline:.3f} | {gain} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "ensembles_output", quick="a tiny net, 200 digits, 20 halves")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="tasks")
    parser.add_argument("--k", type=int, default=2048, help="number of features")
    args = begin(parser, arguments)
    found: list[Result] = []
    for name in args.tasks[:1] if args.quick else args.tasks:
        task = make_tasks()[name]
        task = small(task) if args.quick else task
        truth = kept(args.out, task, *((20, 2, 2) if args.quick else (SUBSETS, SEEDS.get(name, 3), 10)))
        path = args.out / f"halves-{task.name.replace(' ', '-')}-{len(truth.states)}.pt"
        if not path.exists():
            torch.save(train_halves(task, 2 * len(truth.states)), path)
        for result in ensembles(task, truth, torch.load(path), 64 if args.quick else args.k):
            found.append(result)
            save(found, args.out / "ensembles", table)


if __name__ == "__main__":
    main()
