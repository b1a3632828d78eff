"""The exact second stage: conjugate gradients with each preconditioner, and TRAK's candidates scored again.

    python -m benchmarks.second_stage --out second_stage_output                # a quarter of an hour on one core
    python -m benchmarks.second_stage --out second_stage_output --tasks "digits MLP" --targets 5

One checkpoint and few targets. The first table has the iterations and the CPU time of each preconditioner, and the LDS
on these targets; "explicit" factors the matrix, where it is small enough. The second table compares the best ten
training examples of each target by stored features, before and after rescoring, with the exact best ten.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.command_line import begin, options
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, trainer_for
from lightning_trak import TRAK
from lightning_trak.methods import ConjugateGradient, Explicit, InfluenceFunction

SEEDS = {"digits MLP": 5, "digits conv": 2, "written digits": 3, "photographs MLP": 3, "photographs conv": 3}
SOLVERS = {
    "plain": ConjugateGradient(1000),
    "ekfac": ConjugateGradient(1000, preconditioner="ekfac"),
    "landmarks": ConjugateGradient(1000, preconditioner="landmarks"),
    "explicit": Explicit(),
}
EXPLICIT = 10_000  # parameters, at most
TOP = 10


def measured(task: Task, truth: Truth, candidates: int) -> tuple[list[str], list[str]]:
    """The rows of both tables for one task."""
    model = task.make_module().eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    train, trainer = DataLoader(task.train, batch_size=task.batch_size), trainer_for(task)
    solved: list[str] = []
    exact: Tensor | None = None
    for name, solver in SOLVERS.items():
        if isinstance(solver, Explicit) and size > EXPLICIT:
            continue
        method = InfluenceFunction(model, truth.states[:1], output=task.output, solver=solver)
        started = time.process_time()
        exact = method.attribute(trainer, train, task.targets)
        seconds = time.process_time() - started
        iterations = (
            torch.cat([part.iterations for part in method.convergence]).double() if method.convergence else None
        )
        count = "" if iterations is None else f"{float(iterations.mean()):.1f} ({int(iterations.max())})"
        lds = float(truth.measure(exact).compute())
        solved.append(f"| {task.name} | {len(task.train)} | {size} | {name} | {count} | {seconds:.1f} | {lds:.4f} |")
    assert exact is not None
    best = exact.topk(TOP, dim=1).indices
    rescored: list[str] = []
    with tempfile.TemporaryDirectory() as store:
        trak = TRAK(model, truth.states[:1], Path(store) / "features", output=task.output, temperature=1, lag=1)
        trak.featurize(trainer, train)
        for rescore in (None, 100, candidates):
            started = time.process_time()
            found = trak.score(trainer, task.targets, top_k=TOP, rescore=rescore)
            seconds = time.process_time() - started
            shared = (found.indices.unsqueeze(2) == best.unsqueeze(1)).any(2).double().mean()
            rescored.append(f"| {task.name} | {rescore or 'no'} | {seconds:.1f} | {float(shared):.3f} |")
    return solved, rescored


def first_targets(task: Task, truth: Truth, count: int) -> tuple[Task, Truth]:
    """The same task with its first few targets."""
    targets = TensorDataset(*(part[:count] for part in task.targets.tensors))
    return replace(task, targets=targets), replace(truth, outputs=truth.outputs[:count])


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "second_stage_output")
    parser.add_argument("--tasks", nargs="+", choices=SEEDS, default=list(SEEDS), help="tasks; default: all")
    parser.add_argument("--targets", type=int, default=20, help="number of targets")
    parser.add_argument("--candidates", type=int, default=1000, help="candidates that are scored again")
    args = begin(parser, arguments)
    threadpool_limits(1)
    solved = ["| task | n | p | preconditioner | iterations (most) | seconds | LDS |", "|---" * 7 + "|"]
    rescored = ["| task | rescored | seconds | of the exact best ten |", "|---" * 4 + "|"]
    for name in args.tasks:
        task = make_tasks()[name]
        truth = kept(args.out, task, SUBSETS, SEEDS[name], MODELS)
        for table, rows in zip(
            (solved, rescored), measured(*first_targets(task, truth, args.targets), args.candidates), strict=True
        ):
            table += rows
        print("\n".join([*solved, "", *rescored, ""]), flush=True)
    (args.out / "second_stage.md").write_text("\n".join([*solved, "", *rescored, ""]))


if __name__ == "__main__":
    main()
