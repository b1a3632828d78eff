"""Linear datamodeling score of principal features: how many, from how many landmarks, through how wide a sketch.

    python -m benchmarks.principal --out principal_output    # about half an hour on two cores

One model of each task is attributed (M = 1), with the automatic damping and temperature. Every setting is made from one
wide sketch of the gradients of all training examples, as `PrincipalProjection` makes it if its sample holds them all.
"Largest" landmarks are its own choice. "Rest" adds a sparse projection of what the principal directions leave out. The
last column is the difference from `SparseProjection(4096)`, with a 95% interval.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.command_line import begin, difference, options
from benchmarks.stores import featurize
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import SUBSETS, Truth, kept
from lightning_trak.features.rows import Features
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections import SparseProjection
from lightning_trak.projections.landmarks import Landmarks
from lightning_trak.scoring.damping import absolute_damping
from lightning_trak.scoring.newton.noise import Noise
from lightning_trak.scoring.newton.temperature import Tempered

TASKS = ("photographs conv", "photographs MLP")
SEEDS, MODELS = 3, 10
RANDOM = (2048, 4096, 8192, 16384)
SKETCHES, LANDMARKS, WIDTHS = (16384, 32768, 65536), (512, 1024, 2048), (256, 512, 1024, 2048)
REST = ((256, 256), (256, 768), (512, 512), (512, 1536))  # principal features, and features of the rest
CPU = torch.device("cpu")


def sketched(task: Task, truth: Truth, dim: int) -> tuple[Features, Tensor]:
    """Sparse features of all training examples, and of the targets, at the first model."""
    with tempfile.TemporaryDirectory() as directory:
        store, (targets,) = featurize(task, truth.states[:1], SparseProjection(dim), Path(directory))
        parts = [store.read(0, shard) for shard in range(store.num_shards)]
        return Features.cat(parts), targets


def trak(output: ModelOutput, train: Features, features: Tensor, targets: Tensor) -> Tensor:
    """TRAK's scores with some features of the training examples and targets, by its defaults, in the dual.

    With W = sqrt(R) Phi, phi (W^T W + lambda)^-1 = (phi - phi W^T (W W^T + lambda)^-1 W) / lambda.
    """
    features, targets, root = features.double(), targets.double(), train.curvatures.double().sqrt()
    noise = Noise(1)
    noise.add(train.loss_gradients[None], train.curvatures[None])
    weights = train.curvatures.double() * features.square().sum(1)
    ridge = absolute_damping("auto", weights, features.shape[1], "the model", noise.levels(weighted=True)[0])
    weighted = features * root[:, None]
    inner = weighted @ weighted.T
    inner.diagonal().add_(ridge)
    coefficients = torch.cholesky_solve(weighted @ targets.T, torch.linalg.cholesky(inner))
    tempered = Tempered(output, noise.temperature).loss_gradients(train.outputs).double()
    return (targets - coefficients.T @ weighted) @ features.T / ridge * tempered


def chosen(train: Features, count: int, largest: bool) -> Landmarks:
    """Landmarks: the examples that weigh most, or any."""
    some = slice(None) if largest else torch.randperm(len(train.features), generator=torch.Generator().manual_seed(0))
    landmarks = Landmarks(count, train.features.shape[1], CPU)
    rows = some if largest else some[:count]
    landmarks.update(train.features[rows], train.curvatures[rows], train.loss_gradients[rows])
    return landmarks


def with_rest(sketches: Tensor, basis: Tensor, dim: int) -> Tensor:
    """Principal features, and a sparse projection of the rest of the sketches to more features."""
    features = sketches @ basis
    rest = torch.zeros(len(sketches), dim)
    bound = SparseProjection(dim).bind({"rest": (len(basis),)}, 0, 0, CPU)
    bound.add_(rest, "rest", sketches - features @ basis.T)
    return torch.cat([features, rest], 1)


def rows(task: Task, truth: Truth) -> Iterator[str]:
    """The lines of the table."""
    train, targets = sketched(task, truth, 4096)
    baseline = trak(task.output, train, train.features, targets)

    def line(name: str, dim: int, scores: Tensor) -> str:
        lds = float(truth.measure(scores).compute())
        gain = difference(*truth.difference(scores, baseline))
        return f"| {task.name} | {name} | {dim} | {lds:.3f} | {gain} |"

    for dim in RANDOM:
        train, targets = sketched(task, truth, dim)
        yield line("sparse", dim, trak(task.output, train, train.features, targets))
    for sketch in SKETCHES:
        train, targets = sketched(task, truth, sketch)
        for count in LANDMARKS:
            for largest in (True, False):
                basis = chosen(train, count, largest).basis(count)
                features, others = train.features @ basis, targets @ basis
                name = f"sketch {sketch}, {count} {'largest' if largest else 'random'} landmarks"
                for dim in (width for width in WIDTHS if width <= count):
                    yield line(name, dim, trak(task.output, train, features[:, :dim], others[:, :dim]))
                for dim, rest in REST if largest and (sketch, count) == (16384, 1024) else ():
                    pair = (with_rest(each, basis[:, :dim], rest) for each in (train.features, targets))
                    yield line(f"{name}, {dim} and rest", dim + rest, trak(task.output, train, *pair))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    tasks = make_tasks()
    parser = options(__doc__, "principal_output")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=TASKS)
    args = begin(parser, arguments, one_thread=False)
    lines = ["| task | features | k | LDS | difference |", "|---|---|---|---|---|"]
    for name in args.tasks:
        truth = kept(args.out, tasks[name], SUBSETS, SEEDS, MODELS)
        for line in rows(tasks[name], truth):
            print(line, flush=True)
            lines.append(line)
            (args.out / "principal.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
