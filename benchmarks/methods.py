"""Linear datamodeling score against compute, for every method, on handwritten digits.

    python -m benchmarks.methods --out methods_output            # about half an hour on one core
    python -m benchmarks.methods --out methods_output --quick    # a tiny net, two models, under a minute
    python -m benchmarks.methods --out docs --draw docs/methods.json  # the picture again, of what was measured

The truth is the outputs of models retrained on 100 random halves, several times each. The cost of a method is the
training of the models that it needs plus its own time, in units of the training of one model. The directory gets
`methods.json`, `methods.md` (the tables) and `methods.png`. It also keeps the truth.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_hex, to_rgb
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from benchmarks.command_line import begin, difference, options
from benchmarks.labels import Curve, label_curves
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, outputs_of, trainer_for
from examples.digits import LitDigits
from lightning_trak import TRAK, TRAKCallback
from lightning_trak.gradients import last_layer
from lightning_trak.methods import (
    Arnoldi,
    ConjugateGradient,
    Datamodels,
    DataShapley,
    EKFACInfluence,
    EmpiricalInfluence,
    ExactKernel,
    Explicit,
    GradientCosine,
    GradientDot,
    InfluenceFunction,
    KNNShapley,
    LiSSA,
    Method,
    RandomScores,
    RepresentationSimilarity,
    TracIn,
)
from lightning_trak.projections import GaussianProjection, PrincipalProjection, SparseProjection
from lightning_trak.retraining import random_subsets

SEEDS = {"digits MLP": 5, "digits conv": 2}  # trainings on each half: the convolutional net takes forty times as long
RETRAINED = {"digits MLP": (25, 50, 100, 400, 1600), "digits conv": (25, 50, 100)}
ONCE = {  # too slow with ten checkpoints; conjugate gradients and LiSSA approximate what Explicit solves
    "digits MLP": ("influence, CG", "influence, LiSSA"),
    "digits conv": ("influence, Arnoldi",),
}
UNDAMPED = {"TRAK.paper, k = 256": 256, "TRAK.paper, k = 1024": 1024}  # need more training examples than features
TOO_LARGE = {"digits conv": ("influence, explicit", "influence, CG", "influence, LiSSA")}
AVERAGING = "TRAK, Q averaged"  # with one checkpoint, this is the same as TRAK
ONE_RUN = ("TRAK, one run", "TracIn", "TracIn, last layer", "GAS")  # checkpoints of one training run
LASSO: dict[str, Any] = {"alphas": 10, "eps": 0.1, "tol": 1e-2}  # scikit-learn's own defaults take an hour


@dataclass
class Result:
    """One method on one task.

    Attributes:
        task: name of the task.
        method: name of the method.
        checkpoints: number of checkpoints that scores are averaged over.
        runs: number of training runs that the checkpoints come from.
        retrained: number of models retrained on halves of the data.
        own_seconds: CPU time of the method itself, without training.
        cost: training and own time, in units of the training of one model.
        seconds: training and own time, in seconds of CPU time.
        lds: mean over targets.
        low: lower end of the 95% interval over targets and subsets.
        high: upper end.
        behind: LDS of TRAK minus this LDS. TRAK has as many checkpoints, or the most if the method has none.
        behind_low: lower end of its 95% interval, targets and subsets being paired.
        behind_high: upper end.
    """

    task: str
    method: str
    checkpoints: int
    runs: int
    retrained: int
    own_seconds: float
    cost: float
    seconds: float
    lds: float
    low: float
    high: float
    behind: float = 0.0
    behind_low: float = 0.0
    behind_high: float = 0.0


def gradient_methods(model: L.LightningModule) -> dict[str, Callable[[Any, Path], Method]]:
    """The methods for trained models, as functions of the checkpoints and of a directory for a store."""

    def influence(solver: Any) -> Callable[[Any, Path], Method]:
        return lambda checkpoints, _: InfluenceFunction(model, checkpoints, solver=solver)

    def similarity(kind: Any) -> Callable[[Any, Path], Method]:
        return lambda checkpoints, _: RepresentationSimilarity(model, checkpoints, similarity=kind)

    last: Any = {"effect_on": "output", "parameters": last_layer(model)}
    return {
        "TRAK": lambda checkpoints, store: TRAK(model, checkpoints, store),
        "TRAK, one run": lambda checkpoints, store: TRAK(model, checkpoints, store),
        "TRAK, 2048 in float32 (before)": lambda checkpoints, store: TRAK(
            model, checkpoints, store, projection=SparseProjection(2048)
        ),
        "TRAK, principal 1024 in int8": lambda checkpoints, store: TRAK(
            model, checkpoints, store, projection=PrincipalProjection(1024), dtype="int8"
        ),
        "ExactKernel": lambda checkpoints, store: ExactKernel(model, checkpoints, store),
        "TRAK, Q averaged": lambda checkpoints, store: TRAK(model, checkpoints, store, loss_gradients="averaged"),
        "TRAK.paper, k = 256": lambda checkpoints, store: TRAK.paper(
            model, checkpoints, store, projection=GaussianProjection(256)
        ),
        "TRAK.paper, k = 1024": lambda checkpoints, store: TRAK.paper(
            model, checkpoints, store, projection=GaussianProjection(1024)
        ),
        "EK-FAC": lambda checkpoints, _: EKFACInfluence(model, checkpoints),
        "EK-FAC, empirical": lambda checkpoints, _: EKFACInfluence(model, checkpoints, curvature="empirical"),
        "gradient dot": lambda checkpoints, store: GradientDot(model, checkpoints, store, effect_on="output"),
        "gradient cosine": lambda checkpoints, store: GradientCosine(model, checkpoints, store, effect_on="output"),
        "TracIn": lambda checkpoints, store: TracIn(model, checkpoints, store, effect_on="output"),
        "TracIn, last layer": lambda checkpoints, store: TracIn(model, checkpoints, store, **last),
        "GAS": lambda checkpoints, store: GradientCosine(
            model, checkpoints, store, learning_rates="snapshots", effect_on="output"
        ),
        "representations, dot": similarity("dot"),
        "representations, cosine": similarity("cosine"),
        "representations, distance": similarity("l2"),
        "KNN-Shapley": lambda checkpoints, _: KNNShapley(model, checkpoints),
        "influence, Arnoldi": influence(Arnoldi()),
        "influence, explicit": influence(Explicit()),
        "influence, CG": influence(ConjugateGradient()),
        "influence, LiSSA": influence(LiSSA(depth=300, batch_size=128)),
    }


class Measured:
    """One task: its data, its truth, and the time of one training."""

    def __init__(self, task: Task, truth: Truth, directory: Path) -> None:
        self.task, self.truth, self.directory = task, truth, directory
        self.train = DataLoader(task.train, batch_size=task.batch_size, shuffle=True)
        self.examples = DataLoader(task.train, batch_size=100, shuffle=True)
        self.targets = DataLoader(task.targets, batch_size=100)
        self.trainer = trainer_for(task)
        self.reference: dict[int, Tensor] = {}
        self._fit()  # the first training is slower
        self.unit = sorted(self._fit() for _ in range(3))[1]
        every = -(-task.max_epochs * len(self.train) // len(truth.states))
        self._fit(callbacks=[TRAKCallback(directory / "snapshots", every_n_train_steps=every)])

    def _fit(self, **options: Any) -> float:
        torch.manual_seed(0)
        module, trainer = self.task.make_module(), trainer_for(self.task, **options)
        started = time.process_time()
        trainer.fit(module, self.train)
        return time.process_time() - started

    def run(self, name: str, method: Method, checkpoints: int = 0, runs: int = 0, retrained: int = 0) -> Result:
        """Attribute and compare."""
        started = time.process_time()
        scores = method.attribute(self.trainer, self.examples, self.targets)
        own = time.process_time() - started
        if name == "TRAK":
            self.reference[checkpoints] = scores
        lds = self.truth.measure(scores)
        behind = self.truth.difference(self.reference[checkpoints or max(self.reference)], scores)
        cost = runs + retrained / 2 + own / self.unit
        row = (self.task.name, name, checkpoints, runs, retrained, own, cost, cost * self.unit)
        return Result(*row, float(lds.compute()), *map(float, lds.interval()), *behind)


def results(measured: Measured, retrained: tuple[int, ...], orders: int) -> Iterator[Result]:
    """Every method on one task."""
    task, states = measured.task, measured.truth.states
    model = task.make_module().eval()
    for name, make in gradient_methods(model).items():
        singular = UNDAMPED.get(name, 0) >= len(task.train)
        if singular or name in TOO_LARGE.get(task.name, ()):
            continue
        one_run = name in ONE_RUN
        many = len(states)
        counts = (many,) if one_run or name == AVERAGING else (1,) if name in ONCE[task.name] else (1, many)
        for count in counts:
            checkpoints: Any = measured.directory / "snapshots" if one_run else states[:count]
            with tempfile.TemporaryDirectory() as store:
                yield measured.run(name, make(checkpoints, Path(store) / "features"), count, 1 if one_run else count)
    masks = random_subsets(len(task.train), max(retrained), seed=2)
    outputs = outputs_of(task, masks, 1_000_000)  # not the subsets and seeds of the truth
    for count in retrained:
        part = masks[:count], outputs[:, :count]
        yield measured.run("empirical influence", EmpiricalInfluence(*part), retrained=count)
        yield measured.run("datamodels", Datamodels(*part, **LASSO), retrained=count)
    yield measured.run(
        "Data Shapley", DataShapley(task.make_module, lambda: trainer_for(task), permutations=orders, step=150)
    )
    yield measured.run("random", RandomScores())


def tables(found: list[Result], ceilings: dict[str, float], units: dict[str, float]) -> str:
    """Markdown: a table for each task."""
    lines = []
    for task, ceiling in ceilings.items():
        lines += [
            f"**{task}**: noise ceiling {ceiling:.3f}; one training takes {units[task]:.2f} s of CPU time.\n",
            "| method | M | runs | retrained | own (s) | in all (s) | trainings | LDS | 95% | TRAK minus it |",
            "|---" * 10 + "|",
        ]
        for row in sorted((row for row in found if row.task == task), key=lambda row: -row.lds):
            behind = difference(row.behind, row.behind_low, row.behind_high)
            cells = [
                *(row.method, row.checkpoints or "", row.runs or "", row.retrained or ""),
                *(f"{row.own_seconds:.1f}", f"{row.seconds:.1f}", f"{row.cost:.1f}"),
                *(f"{row.lds:.3f}", f"{row.low:.3f} to {row.high:.3f}", "" if row.method == "TRAK" else behind),
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return "\n".join(lines)


COLORS = {  # of a family; its later members are paler
    "TRAK": "tab:red",
    "ExactKernel": "darkred",
    "EK-FAC": "tab:blue",
    "influence": "tab:green",
    "gradient": "tab:orange",
    "TracIn": "tab:brown",
    "GAS": "olive",
    "representations": "tab:purple",
    "KNN-Shapley": "deeppink",
    "empirical influence": "black",
    "datamodels": "dimgrey",
    "Data Shapley": "teal",
}


def tint(color: str, whiteness: float) -> str:
    """A color mixed with white; ``whiteness`` is from 0 (the color) to 1 (white)."""
    return to_hex([value + (1 - value) * whiteness for value in to_rgb(color)])


def plot(found: list[Result], ceilings: dict[str, float], path: Path) -> None:
    """LDS against cost: a panel for each task, a line from few to many models for each method, with its name."""
    names = [name for name in dict.fromkeys(row.method for row in found) if name != "random"]
    families = {name: next(family for family in COLORS if name.startswith(family)) for name in names}
    figure, axes = plt.subplots(len(ceilings), 1, figsize=(7.4, 6.2 * len(ceilings)), squeeze=False)
    for axis, (task, ceiling) in zip(axes.flat, ceilings.items(), strict=True):
        curves = {}
        for name in names:
            rows = [row for row in found if (row.task, row.method) == (task, name)]
            if not rows:
                continue
            members = [other for other in names if families[other] == families[name]]
            color = tint(COLORS[families[name]], 0.5 * members.index(name) / len(members))
            points = np.array([(row.cost, row.lds) for row in rows])
            ends = np.array([(row.low, row.high) for row in rows])
            style: dict[str, Any] = {"linewidth": 2.5, "markersize": 8} if name == "TRAK" else {"linewidth": 1}
            errors = np.abs(ends - points[:, 1:]).T
            axis.errorbar(*points.T, errors, elinewidth=0.6, marker="o", color=color, **{"markersize": 4} | style)
            curves[name] = Curve(points, ends, color, "bold" if name == "TRAK" else "normal")
        chance = [row.lds for row in found if (row.task, row.method) == (task, "random")]
        for value, name, line in [(ceiling, "noise ceiling", "--"), *((value, "random", ":") for value in chance)]:
            axis.axhline(value, color="grey", linestyle=line)
            axis.text(
                0.995, value, name, transform=axis.get_yaxis_transform(), ha="right", va="bottom", color="grey", size=8
            )
        axis.set(xscale="log", title=task, ylabel="LDS (bars: 95% over targets and subsets)")
        axis.margins(x=0.12, y=0.05)
        axis.grid(alpha=0.2)
        label_curves(axis, curves)
    axes[-1][0].set_xlabel("cost (trainings of one model; models and own time)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


class SmallMLP(LitDigits):
    """A perceptron so small that every method takes about a second."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def small(task: Task) -> Task:
    """A smaller model, less data and shorter training."""
    train, targets = (
        TensorDataset(*(part[:count] for part in data.tensors))
        for data, count in ((task.train, 200), (task.targets, 20))
    )
    return replace(task, make_module=SmallMLP, train=train, targets=targets, max_epochs=2, batch_size=20)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "methods_output", quick="a tiny net, 200 digits, two models, 20 halves")
    parser.add_argument("--tasks", nargs="+", choices=SEEDS, help="tasks; default: all, or the first with --quick")
    parser.add_argument("--draw", type=Path, help="a methods.json: draw its picture, and measure nothing")
    args = begin(parser, arguments)
    if args.draw:
        kept_results = json.loads(args.draw.read_text())
        plot(
            [Result(**row) for row in kept_results["results"]], kept_results["noise_ceilings"], args.out / "methods.png"
        )
        return
    threadpool_limits(1)  # one thread for NumPy, too: others would use CPU time while they wait
    found = []
    ceilings, units = {}, {}
    for name in args.tasks or list(SEEDS)[: 1 if args.quick else None]:
        task = make_tasks()[name]
        task = small(task) if args.quick else task
        truth = kept(args.out, task, *((20, 2, 2) if args.quick else (SUBSETS, SEEDS[name], MODELS)))
        ceilings[name] = float(truth.measure(torch.zeros(len(task.targets), len(task.train))).noise_ceiling())
        with tempfile.TemporaryDirectory() as directory:
            measured = Measured(task, truth, Path(directory))
            units[name] = measured.unit
            progress = tqdm(results(measured, (25,) if args.quick else RETRAINED[name], 1 if args.quick else 5), name)
            for result in progress:
                progress.set_postfix_str(f"{result.method} {result.checkpoints or result.retrained}: {result.lds:.3f}")
                found.append(result)
                kept_results = {"noise_ceilings": ceilings, "unit_seconds": units, "results": list(map(asdict, found))}
                (args.out / "methods.json").write_text(json.dumps(kept_results, indent=1))
    (args.out / "methods.md").write_text(tables(found, ceilings, units))
    plot(found, ceilings, args.out / "methods.png")
    print(tables(found, ceilings, units))


if __name__ == "__main__":
    main()
