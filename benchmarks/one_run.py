"""Linear datamodeling score for one training run, and for other seeds: metagradients beside other methods.

    python -m benchmarks.one_run --out one_run_output            # some minutes on one core
    python -m benchmarks.one_run --out one_run_output --quick    # one task, few epochs and models

Two truths. "This run": the recorded run again, with the same seed and order, and weights 0 on some of the examples (the
denominators stay). "Other seeds": models trained on random halves with seeds of their own. The directory gets
`one_run.json`, `one_run.md` (the tables: LDS, and whether each run is smooth) and `one_run.png`.
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.command_line import begin, options
from benchmarks.tasks import LitText, Task, _patches, _texts
from benchmarks.truth import outputs_of, train_all, trainer_for
from examples.digits import LitDigits, make_data
from lightning_trak import TRAK, LinearDatamodelingScore, Metagradient, TrainingRecorder, TRAKCallback
from lightning_trak.methods import EKFACInfluence, ExactKernel, Method, TracIn
from lightning_trak.outputs import CausalLMMargin, ClassificationMargin
from lightning_trak.replay import SmoothAdamW, metasmoothness
from lightning_trak.retraining import RecordedFleet, random_removals, random_subsets
from lightning_trak.scoring import combine_scores

FRACTIONS = (0.01, 0.05, 0.1, 0.5)
TARGETS = 20
METHODS = ("metagradient", "exact Gauss-Newton", "TRAK", "EK-FAC", "TracIn")  # of the picture
AVERAGE = "metagradient, average order"
COMBINED = "combined"  # exact Gauss-Newton with the average order


class SmoothMLP(LitDigits):
    """A perceptron, trained with a small learning rate."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class SmoothConvNet(LitDigits):
    """Two convolutions without normalization, trained with a small learning rate."""

    def __init__(self) -> None:
        super().__init__()
        first, second = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.net = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


class SmoothText(LitText):
    """A small causal transformer, trained with AdamW whose steps are smooth.

    Args:
        start: the weights to begin with; default: random ones.
        learning_rate: of AdamW.
    """

    def __init__(self, start: dict[str, Tensor] | None = None, learning_rate: float = 3e-3) -> None:
        super().__init__(width=16)
        self.learning_rate = learning_rate
        if start is not None:
            self.load_state_dict(start)

    def configure_model_output(self) -> CausalLMMargin:
        return CausalLMMargin()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SmoothAdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01, eps_root=1e-6)


def image_losses(module: nn.Module, batch: Any) -> Tensor:
    """The loss of each image."""
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def text_losses(module: nn.Module, batch: Any) -> Tensor:
    """The loss of each text."""
    (ids,) = batch
    return F.cross_entropy(module(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").mean(1)


@cache
def make_tasks(num_targets: int = TARGETS) -> list[tuple[Task, Callable[[nn.Module, Any], Tensor]]]:
    """The tasks, each with the loss of each example."""

    def cut(data: TensorDataset, start: int, stop: int) -> TensorDataset:
        return TensorDataset(*(part[start:stop] for part in data.tensors))

    digits, other_digits = make_data()
    patches, other_patches = _patches(600, num_targets, size=8)
    texts, other_texts = _texts(400, num_targets)
    margin, text_margin = ClassificationMargin(), CausalLMMargin()
    images = [
        Task(
            "MLP",
            "800 digits, perceptron, SGD",
            SmoothMLP,
            margin,
            cut(digits, 0, 800),
            cut(other_digits, 0, num_targets),
            20,
            50,
        ),
        Task(
            "convolutional net",
            "600 noisy patches, two convolutions, SGD",
            SmoothConvNet,
            margin,
            patches,
            other_patches,
            20,
            50,
        ),
    ]
    scratch = Task(
        "GPT-2-like",
        "200 texts, two causal layers, AdamW",
        SmoothText,
        text_margin,
        cut(texts, 0, 200),
        other_texts,
        6,
        25,
    )
    (start,) = train_all(scratch, 1)
    tuned = Task(
        "AdamW fine-tuning",
        "the transformer, fine-tuned on 200 other texts",
        partial(SmoothText, start, 1e-3),
        text_margin,
        cut(texts, 200, 400),
        other_texts,
        4,
        25,
    )
    return [*((task, image_losses) for task in images), *((task, text_losses) for task in (scratch, tuned))]


@dataclass
class Result:
    """One method on one task, for one truth.

    Attributes:
        task: name of the task.
        method: name of the method.
        truth: "this run, 1%" and so on, or "other seeds, halves".
        lds: mean over targets.
        low: lower end of the 95% interval over targets and subsets.
        high: upper end.
        cost: the run and the method's own time, in trainings (CPU time of one by a Trainer).
    """

    task: str
    method: str
    truth: str
    lds: float
    low: float
    high: float
    cost: float


@dataclass
class Verdict:
    """Whether the recorded run of a task is smooth, as :func:`~lightning_trak.replay.metasmoothness` says.

    Attributes:
        task: name of the task.
        value: metasmoothness.
        ceiling: the highest correlation that scores can have with this run's truth at 1%.
        smooth: the verdict.
        seeds_ceiling: the highest LDS that scores can be expected to have for other seeds: each half was trained twice.
    """

    task: str
    value: float
    ceiling: float
    smooth: bool
    seeds_ceiling: float


def fit(task: Task, seed: int, recording: Path, snapshots: Path | None = None) -> L.LightningModule:
    """Train once, with a recording."""
    torch.manual_seed(seed)
    module = task.make_module()
    steps = task.max_epochs * -(-len(task.train) // task.batch_size)
    callbacks: list[L.Callback] = [TrainingRecorder(recording)]
    if snapshots is not None:
        callbacks.append(TRAKCallback(snapshots, every_n_train_steps=max(1, steps // 10)))
    loader = DataLoader(task.train, batch_size=task.batch_size, shuffle=True)
    trainer_for(task, callbacks=callbacks).fit(module, loader)
    return module


def again(
    task: Task, module: nn.Module, recording: Path, losses: Callable[[nn.Module, Any], Tensor], kept: Tensor
) -> Tensor:
    """Train the recorded run again, without some examples: bool ``(members, num_train)``.

    Returns:
        Outputs, ``(num_targets, members)``.
    """
    with tempfile.TemporaryDirectory() as folder:
        data, trainer = DataLoader(task.train), trainer_for(task)
        fleet = RecordedFleet(
            folder, module, recording, trainer, data, task.targets, kept, output=task.output, losses=losses
        )
        fleet.run(together=len(kept), progress_bar=False)
        return fleet.outputs[..., 0]


def results(
    task: Task, losses: Callable[[nn.Module, Any], Tensor], members: int, folder: Path
) -> tuple[list[Result], Verdict]:
    """Every method, for every truth, and whether the first run is smooth."""
    loader, targets = DataLoader(task.train, batch_size=task.batch_size), DataLoader(task.targets, batch_size=TARGETS)
    fit(task, 1, folder / "second")  # the first training is slower
    started = time.process_time()
    module = fit(task, 0, folder / "first", folder / "snapshots")
    unit = time.process_time() - started
    trainer, found, scores = trainer_for(task), [], {}
    options: dict[str, Any] = {"output": task.output, "losses": losses, "progress_bar": False}
    smoothness = metasmoothness(module, folder / "first", trainer, loader, targets, **options)
    truths = {}
    for fraction in FRACTIONS:
        kept = random_removals(len(task.train), members, fraction)
        truths[f"this run, {fraction:.0%}"] = kept, again(task, module, folder / "first", losses, kept)
    masks = random_subsets(len(task.train), 2 * members, seed=1)
    outputs = [outputs_of(task, masks, 1000 + seed * len(masks)) for seed in range(2)]
    truths["other seeds, halves"] = masks, torch.stack(outputs, 2)
    states = [module.state_dict()]
    output = task.output
    methods: dict[str, Method] = {
        "metagradient": Metagradient(module, folder / "first", check_smooth=False, **options),
        AVERAGE: Metagradient(module, folder / "first", order="average", check_smooth=False, **options),
        "exact Gauss-Newton": ExactKernel(module, states, folder / "kernel", output=output),
        "TRAK": TRAK(module, states, folder / "features", output=output),
        "EK-FAC": EKFACInfluence(module, states, output=output),
        "TracIn": TracIn(module, folder / "snapshots", folder / "tracin", output=output, effect_on="output"),
    }
    costs = {}
    for name, method in methods.items():
        started = time.process_time()
        scores[name] = method.attribute(trainer, loader, targets)
        costs[name] = 1 + (time.process_time() - started) / unit
    second = Metagradient(module, folder / "second", check_smooth=False, **options)
    scores["metagradient, two runs"] = scores["metagradient"] + second.attribute(trainer, loader, targets)
    costs["metagradient, two runs"] = 2 * costs["metagradient"]
    scores[COMBINED] = combine_scores(scores["exact Gauss-Newton"], scores[AVERAGE])
    costs[COMBINED] = costs["exact Gauss-Newton"] + costs[AVERAGE] - 1
    for name, own in scores.items():
        for truth, (kept, changed) in truths.items():
            lds = LinearDatamodelingScore(kept)
            lds.update(own, changed)
            found.append(Result(task.name, name, truth, float(lds.compute()), *map(float, lds.interval()), costs[name]))
    ceiling = float(lds.noise_ceiling())  # of the last truth: other seeds
    return found, Verdict(task.name, smoothness.value, smoothness.ceiling, smoothness.smooth, ceiling)


def verdict_table(verdicts: list[Verdict]) -> str:
    """Markdown."""
    columns = "task", "metasmoothness", "noise ceiling at 1%", "smooth", "noise ceiling for other seeds"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in verdicts:
        smooth = "yes" if row.smooth else "no"
        lines.append(f"| {row.task} | {row.value:.2f} | {row.ceiling:.3f} | {smooth} | {row.seeds_ceiling:.3f} |")
    return "\n".join(lines) + "\n"


def table(found: list[Result]) -> str:
    """Markdown."""
    truths = list(dict.fromkeys(row.truth for row in found))
    lines = [f"| task | method | {' | '.join(truths)} | trainings |", "|---" * (len(truths) + 3) + "|"]
    for task, method in dict.fromkeys((row.task, row.method) for row in found):
        rows = {row.truth: row for row in found if (row.task, row.method) == (task, method)}
        cells = [f"{row.lds:.3f} ({row.low:.3f} to {row.high:.3f})" for row in map(rows.__getitem__, truths)]
        lines.append(f"| {task} | {method} | {' | '.join(cells)} | {rows[truths[0]].cost:.0f} |")
    return "\n".join(lines) + "\n"


# Okabe and Ito's colours, which differ for colour-blind readers; markers differ too.
STYLES = dict(zip(METHODS, ("#D55E00", "#000000", "#0072B2", "#009E73", "#CC79A7"), strict=True))
MARKERS = dict(zip(METHODS, "os^Dv", strict=True))


def plot(found: list[Result], path: Path) -> None:
    """A panel for each task: LDS for this run by the fraction removed, and for other seeds at the right."""
    tasks, truths = (list(dict.fromkeys(getattr(row, field) for row in found)) for field in ("task", "truth"))
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks) + 1, 4.6), squeeze=False, sharey=True)
    for axis, task in zip(axes[0], tasks, strict=True):
        for number, method in enumerate(METHODS):
            rows = [row for row in found if (row.task, row.method) == (task, method)]
            for part, label in ((range(len(rows) - 1), method), (range(len(rows) - 1, len(rows)), None)):
                x = [place + 0.08 * (number - 2) for place in part]
                y = [rows[place].lds for place in part]
                errors = [[rows[p].lds - rows[p].low for p in part], [rows[p].high - rows[p].lds for p in part]]
                style: dict[str, Any] = {"color": STYLES[method], "marker": MARKERS[method], "label": label}
                axis.errorbar(x, y, errors, elinewidth=0.8, linewidth=1.5, **style)
        axis.axvline(len(truths) - 1.5, color="grey", linestyle=":")
        axis.set_xticks(range(len(truths)), [*(t.rpartition(" ")[2] for t in truths[:-1]), "other\nseeds"])
        axis.set(title=task, xlabel="removed from this run")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("LDS (bars: 95% over targets and subsets)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=len(METHODS), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "one_run_output", quick="the first task alone, 3 epochs, few retrained models")
    parser.add_argument("--members", type=int, default=30, help="retrained runs for each fraction")
    args = begin(parser, arguments)
    found: list[Result] = []
    verdicts: list[Verdict] = []
    tasks = make_tasks()
    if args.quick:
        tasks = [(replace(task, max_epochs=3), losses) for task, losses in tasks[:1]]
    for task, losses in tasks:
        with tempfile.TemporaryDirectory() as folder:
            own, verdict = results(task, losses, 5 if args.quick else args.members, Path(folder))
        found, verdicts = [*found, *own], [*verdicts, verdict]
        rows = {"lds": [asdict(row) for row in found], "smoothness": [asdict(row) for row in verdicts]}
        (args.out / "one_run.json").write_text(json.dumps(rows, indent=1))
        (args.out / "one_run.md").write_text(f"{table(found)}\n{verdict_table(verdicts)}")
        plot(found, args.out / "one_run.png")
        print(table([row for row in found if row.task == task.name]), flush=True)


if __name__ == "__main__":
    main()
