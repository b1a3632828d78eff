"""What a projection costs: LDS against bytes of an example, and against seconds, on tasks with many weights.

    python -m benchmarks.bytes --out bytes_output            # about an hour on one core
    python -m benchmarks.bytes --out bytes_output --quick    # one small task, under a minute

All settings have the same models, targets and truth, and `damping="auto"`. The exact kernel is TRAK without a
projection. Bytes are those of an example's features at a checkpoint; principal features also keep their directions,
which are the same for any number of examples. Seconds are CPU time, for features of the training set and for scores of
all targets. Everything is written to the directory: `bytes.json`, `bytes.md` and `bytes.png`.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from torch.utils.data import DataLoader

from benchmarks.command_line import begin, difference, options, save
from benchmarks.methods import small
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, trainer_for
from lightning_trak import TRAK
from lightning_trak.features.dtypes import Dtype
from lightning_trak.methods import ExactKernel
from lightning_trak.methods.features.base import FeatureMethod
from lightning_trak.projections import KroneckerProjection, PrincipalProjection, Projection, SparseProjection

TASKS = ("written digits", "photographs MLP", "photographs conv")
SEEDS = 3


def _trak(projection: Projection | None, dtype: Dtype | None) -> Callable[..., FeatureMethod]:
    return partial(TRAK, projection=projection, dtype=dtype)


OLD, EXACT = "sparse 2048, float32 (the default before)", "exact kernel"
SETTINGS: dict[str, Callable[..., FeatureMethod]] = {
    OLD: _trak(SparseProjection(2048), "float32"),
    "sparse 2048, int8": _trak(SparseProjection(2048), "int8"),
    "sparse 8192, int8": _trak(SparseProjection(8192), "int8"),
    "sparse 16384, int4 (the default)": _trak(None, None),
    "sparse 16384, int4, temperature 1": partial(TRAK, temperature=1),
    "principal 512, int8": _trak(PrincipalProjection(512), "int8"),
    "principal 1024, int8": _trak(PrincipalProjection(1024), "int8"),
    "principal 2048, int8": _trak(PrincipalProjection(2048), "int8"),
    "Kronecker 16 x 16 to 2048, float32": _trak(KroneckerProjection(16, 16, dim=2048), "float32"),
    EXACT: ExactKernel,
}


@dataclass
class Result:
    """One setting on one task.

    Attributes:
        task: name of the task.
        setting: name of the setting.
        models: number of models averaged, M.
        bytes: of an example's features at a checkpoint.
        directions: bytes that a checkpoint takes whatever the number of examples.
        featurize_seconds: CPU seconds for the features of the training set at all checkpoints.
        score_seconds: CPU seconds for the scores of all targets.
        lds: mean over targets.
        low: lower end of the 95% interval over targets and subsets.
        high: upper end.
        ahead: LDS minus that of the old default.
        ahead_low: lower end of the 95% interval of this difference.
        ahead_high: upper end.
    """

    task: str
    setting: str
    models: int
    bytes: int
    directions: int
    featurize_seconds: float
    score_seconds: float
    lds: float
    low: float
    high: float
    ahead: float
    ahead_low: float
    ahead_high: float


def results(task: Task, truth: Truth, counts: tuple[int, ...], names: list[str]) -> Iterator[Result]:
    """Settings on a task, for each number of models."""
    trainer = trainer_for(task)
    train, targets = DataLoader(task.train, batch_size=100), DataLoader(task.targets, batch_size=100)
    for count in counts:
        old = None
        for name in names:
            with tempfile.TemporaryDirectory() as directory:
                method = SETTINGS[name](task.make_module().eval(), truth.states[:count], directory, output=task.output)
                started = time.process_time()
                method.featurize(trainer, train)
                featurized = time.process_time()
                files = [path for path in Path(directory).rglob("*.safetensors") if path.parent.name != "examples"]
                scores = method.score(trainer, targets)
                scored = time.process_time()
                shards = sum(path.stat().st_size for path in files if path.stem.startswith("shard"))
                others = sum(path.stat().st_size for path in files if path.stem == "projection")
            old = scores if old is None else old
            lds = truth.measure(scores)
            yield Result(
                *(task.name, name, count, round(shards / len(task.train) / count), others // count),
                *(featurized - started, scored - featurized),
                *(float(lds.compute()), *map(float, lds.interval())),
                *truth.difference(scores, old),
            )


def table(found: list[Result]) -> str:
    """Markdown."""
    lines = [
        "| task | features | M | bytes an example | MB a checkpoint | features (s) | scores (s) | LDS | 95% | ahead |",
        "|---" * 10 + "|",
    ]
    for row in found:
        ahead = "" if row.setting == OLD else difference(row.ahead, row.ahead_low, row.ahead_high)
        cells = [
            *(
                row.task,
                row.setting,
                row.models,
                f"{row.bytes:,}",
                f"{row.directions / 1e6:.0f}" if row.directions else "",
            ),
            *(f"{row.featurize_seconds:.1f}", f"{row.score_seconds:.1f}"),
            *(f"{row.lds:.3f}", f"{row.low:.3f} to {row.high:.3f}", ahead),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def plot(found: list[Result], path: Path) -> None:
    """LDS against bytes (above) and against seconds (below): a column for each task, a colour for each setting."""
    tasks = list(dict.fromkeys(row.task for row in found))
    figure, axes = plt.subplots(2, len(tasks), figsize=(4.6 * len(tasks) + 1, 8.6), squeeze=False, sharey="col")
    for column, task in enumerate(tasks):
        for number, setting in enumerate(SETTINGS):
            rows = [row for row in found if (row.task, row.setting) == (task, setting)]
            for row in rows:
                marker = "o" if row.models == 1 else "s"
                style: dict[str, Any] = {"marker": marker, "color": f"C{number}", "linestyle": "", "markersize": 7}
                error = [[row.lds - row.low], [row.high - row.lds]]
                label = setting if row.models == 1 else None
                axes[0][column].errorbar(row.bytes, row.lds, error, elinewidth=0.7, label=label, **style)
                seconds = row.featurize_seconds + row.score_seconds
                axes[1][column].errorbar(seconds, row.lds, error, elinewidth=0.7, **style)
        axes[0][column].set(title=task, xscale="log", xlabel="bytes of an example at a checkpoint")
        axes[1][column].set(xscale="log", xlabel="CPU seconds, features and scores")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
            axis.xaxis.set_minor_formatter("")  # labels of all powers would overlap
    for axis in axes[:, 0]:
        axis.set_ylabel("LDS (circles: M = 1, squares: more)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "bytes_output", quick="a tiny net, 200 digits, two models, 20 halves")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="tasks; default: all")
    parser.add_argument("--models", nargs="+", type=int, default=[1, MODELS], help="numbers of models averaged")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="settings; default: all"
    )
    args = begin(parser, arguments)
    found: list[Result] = []
    for name in ("digits MLP",) if args.quick else args.tasks:
        task = small(make_tasks()[name]) if args.quick else make_tasks()[name]
        truth = kept(args.out, task, *((20, 2, 2) if args.quick else (SUBSETS, SEEDS, MODELS)))
        for result in results(task, truth, (1, 2) if args.quick else tuple(args.models), args.settings):
            found.append(result)
            save(found, args.out / "bytes", table)
    plot(found, args.out / "bytes.png")


if __name__ == "__main__":
    main()
