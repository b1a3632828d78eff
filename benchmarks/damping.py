"""The automatic damping against the best constant, and against the rule before it.

    python -m benchmarks.damping --out damping_output            # two hours on one core, an hour of it retraining
    python -m benchmarks.damping --out damping_output --quick    # one small task, under a minute

Each task is measured with TRAK by default and with the exact kernel, at one model and at ten: the constant damping with
the highest linear datamodeling score (LDS), its LDS, and the LDS of ``damping="auto"``, of the former rule,
k / (2 n_eff), and of ``damping="auto"`` together with ``temperature="auto"``. With one model, each of the first three
models is measured, and their mean is taken.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks.command_line import begin, options, save
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, trainer_for
from lightning_trak import TRAK
from lightning_trak.methods import ExactKernel
from lightning_trak.scoring.damping import Damping
from lightning_trak.scoring.newton import trak
from lightning_trak.texts.tables import Table

SEEDS = 3
METHODS: dict[str, type[TRAK | ExactKernel]] = {"exact kernel": ExactKernel, "default": TRAK}
SINGLE = 3  # models that are measured one by one
START = 10.0  # the constant that the search begins with


@dataclass
class Result:
    """The dampings of a task at a number of models.

    Attributes:
        task: name of the task.
        method: "exact kernel", or TRAK's "default".
        models: number of models averaged.
        best: the constant damping with the highest LDS.
        best_lds: its LDS.
        former_lds: LDS of the former rule.
        auto_lds: LDS of "auto".
        tempered_lds: LDS of "auto" with temperature="auto".
    """

    task: str
    method: str
    models: int
    best: float
    best_lds: float
    former_lds: float
    auto_lds: float
    tempered_lds: float


def former_damping(trace: Tensor, squared_weights: Tensor, size: int, noise: float = 1.0) -> float:
    """The rule before, k / (2 n_eff): see :func:`~lightning_trak.scoring.damping.auto_damping` for the arguments."""
    return float(size * squared_weights / (2 * trace.square()))


class Measured:
    """A method with the features of a task at some models."""

    def __init__(self, name: str, task: Task, states: list[dict[str, Tensor]], truth: Truth, directory: Path) -> None:
        self.truth, self.trainer = truth, trainer_for(task)
        self.targets = DataLoader(task.targets, batch_size=100)
        module = task.make_module().eval()
        self.method = METHODS[name](module, states, directory, output=task.output, temperature=1)
        self.method.featurize(self.trainer, DataLoader(task.train, batch_size=100))

    def lds(self, damping: Damping) -> float:
        """At a constant damping, or at the automatic one."""
        self.method.damping = damping
        return float(self.truth.measure(self.method.score(self.trainer, self.targets)).compute())

    def tempered_lds(self) -> float:
        """At the automatic damping and temperature."""
        with patch.object(self.method, "temperature", "auto"):
            return self.lds("auto")

    def former_lds(self) -> float:
        """With the former rule in place of the automatic one."""
        with patch.object(trak, "auto_damping", former_damping):
            return self.lds("auto")


def best_constant(lds: Callable[[float], float]) -> tuple[float, float]:
    """The constant with the highest LDS, and its LDS: uphill by decades, and then by thirds of a decade."""
    best, lds = START, cache(lds)
    for step in (10.0, 10 ** (1 / 3)):
        while (other := max((best / step, best * step), key=lds)) and lds(other) > lds(best):
            best = other
    return best, lds(best)


def results_of(name: str, task: Task, truth: Truth) -> Iterator[Result]:
    """At one model, averaged over the first few, and at all."""
    singles = [[state] for state in truth.states[:SINGLE]]
    for chosen in (singles, [truth.states]):
        with tempfile.TemporaryDirectory() as directory:
            measured = [Measured(name, task, part, truth, Path(directory) / str(i)) for i, part in enumerate(chosen)]

            def mean(lds: Callable[[Measured], float], measured: list[Measured] = measured) -> float:
                return sum(map(lds, measured)) / len(measured)

            best, best_lds = best_constant(lambda damping: mean(lambda one: one.lds(damping)))
            former, auto = mean(Measured.former_lds), mean(lambda one: one.lds("auto"))
            tempered = mean(Measured.tempered_lds)
        yield Result(task.name, name, len(chosen[0]), best, best_lds, former, auto, tempered)


def table(results: list[Result]) -> str:
    """Markdown."""
    lines = ("former rule", "auto", "tempered")
    columns = ("task", "method", "M", "best constant", "its LDS", *lines, *(f"{line} / best" for line in lines))
    rows = []
    for r in results:
        found = r.former_lds, r.auto_lds, r.tempered_lds
        lds = [f"{value:.3f}" for value in (r.best_lds, *found)]
        shares = [f"{value / r.best_lds:.3f}" for value in found]
        rows.append((r.task, r.method, r.models, f"{r.best:.3g}", *lds, *shares))
    return Table(columns, rows).markdown() + "\n"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    tasks = make_tasks()
    parser = options(__doc__, "damping_output", quick="20 halves once, 2 models")
    parser.add_argument("--tasks", nargs="+", choices=tasks, help="tasks; default: all, or one with --quick")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    args = begin(parser, arguments)
    wide = (20, 1, 2) if args.quick else (SUBSETS, SEEDS, MODELS)
    results: list[Result] = []
    for name in tqdm(args.tasks or (["diabetes"] if args.quick else list(tasks))):
        truth = kept(args.out, tasks[name], *wide)
        for method in args.methods:
            for result in results_of(method, tasks[name], truth):
                results.append(result)
                save(results, args.out / "damping", table)
    print(table(results))


if __name__ == "__main__":
    main()
