"""What TRAK's score depends on: k, training epochs, and how many runs the checkpoints come from.

    python -m benchmarks.ablations --out ablations_output            # about three minutes
    python -m benchmarks.ablations --out ablations_output --quick    # a tiny net, few models, under a minute

The ablations of TRAK's authors, on handwritten digits and a perceptron, with the published settings and the defaults.
The truth comes from models retrained on random halves. The directory gets `ablations.json`, `ablations.md` (the tables)
and `ablations.png`. It also keeps the truth.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.command_line import begin, options
from benchmarks.methods import SEEDS, small
from benchmarks.stores import featurize
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, train_all
from lightning_trak.features.rows import Features
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections import SparseProjection
from lightning_trak.scoring.damping import auto_damping
from lightning_trak.scoring.newton.gram import Curvature, DampedGram, gram_matrix
from lightning_trak.scoring.newton.noise import Noise
from lightning_trak.scoring.newton.temperature import Tempered

TASK = "digits MLP"
SETTINGS = {"defaults": 1024, "published": 128}  # k where it is not varied; the published LDS falls at larger k
# TRAK's authors on CIFAR-10, Park et al. 2023 (arXiv 2303.14186): LDS at x, with their defaults.
LITERATURE = {
    "epochs": ("CIFAR-10, M = 100, k = 1000", {1: 0.100, 5: 0.204, 10: 0.265, 15: 0.293, 25: 0.308}),
    "runs": ("CIFAR-10, M = 100, k = 4000", {5: 0.329, 6: 0.340, 10: 0.350, 100: 0.355}),
}


@dataclass
class Result:
    """One point of a curve.

    Attributes:
        ablation: "k", "epochs" or "runs".
        settings: the settings of TRAK, "defaults" or "published" (no curvature, no damping, Q averaged).
        models: M, checkpoints that are averaged.
        x: the value of the quantity that is varied.
        lds: mean over targets; None where the Gram matrix is singular.
        low: lower end of the 95% interval over targets and subsets.
        high: upper end.
    """

    ablation: str
    settings: str
    models: int
    x: int
    lds: float | None
    low: float | None
    high: float | None


def scores(settings: str, output: ModelOutput, rows: list[Features], targets: list[Tensor]) -> Tensor:
    """TRAK's scores, averaged over models: (num_targets, num_train).

    Args:
        settings: "defaults" or "published".
        output: gives the loss.
        rows: features of the training set at each model.
        targets: features of the targets at each model, (num_targets, k).

    Raises:
        ValueError: if a Gram matrix is singular.
    """
    published = settings == "published"
    noise = Noise(len(rows))
    noise.add(torch.stack([part.loss_gradients for part in rows]), torch.stack([part.curvatures for part in rows]))
    tempered = Tempered(output, noise.temperature)
    products = weighted = torch.zeros(())
    for part, features, level in zip(rows, targets, noise.levels(weighted=True), strict=True):
        curvature: Curvature = "identity" if published else "gauss_newton"
        gram, squared_weights = gram_matrix([part], curvature, features.shape[1], torch.device("cpu"))
        damping = 0.0 if published else auto_damping(gram.trace(), squared_weights, len(gram), level)
        product = DampedGram(gram, damping, torch.float32, "features").solve(features) @ part.features.T
        products, weighted = products + product, weighted + product * tempered.loss_gradients(part.outputs)
    return products * sum(part.loss_gradients for part in rows) if published else weighted


def curve(
    task: Task, truth: Truth, states: list[dict[str, Tensor]], k: int, counts: tuple[int, ...], chosen: Iterable[str]
) -> Iterator[tuple[str, int, float | None, float | None, float | None]]:
    """LDS and interval of the chosen settings at several numbers of models, from one set of features."""
    with tempfile.TemporaryDirectory() as directory:
        store, targets = featurize(task, states, SparseProjection(k), Path(directory))
        rows = [
            Features.cat([store.read(checkpoint, shard) for shard in range(store.num_shards)])
            for checkpoint in range(len(states))
        ]
    for settings in chosen:
        for count in counts:
            yield settings, count, *_measured(truth, settings, task.output, rows[:count], targets[:count])


def _measured(
    truth: Truth, settings: str, output: ModelOutput, rows: list[Features], targets: list[Tensor]
) -> tuple[float, float, float] | tuple[None, None, None]:
    """LDS and its interval, or None if a Gram matrix is singular."""
    try:
        lds = truth.measure(scores(settings, output, rows, targets))
    except ValueError:
        return None, None, None
    low, high = lds.interval(num_bootstraps=300).tolist()
    return float(lds.compute()), low, high


def ablations(task: Task, truth: Truth, quick: bool) -> Iterator[Result]:
    """All points."""

    def points(
        name: str, x: int, states: list[dict[str, Tensor]], k: int, counts: tuple[int, ...], chosen: Iterable[str]
    ) -> Iterator[Result]:
        for settings, count, *lds in curve(task, truth, states, k, counts, chosen):
            yield Result(name, settings, count, x, *lds)

    counts = (1, 2) if quick else (1, 5, 20)
    states = train_all(task, counts[-1])
    for k in (16, 32) if quick else (32, 64, 128, 256, 512, 1024, 2048):
        yield from points("k", k, states, k, counts, SETTINGS)
    models = 2 if quick else 10
    widths = dict.fromkeys(SETTINGS, 16) if quick else SETTINGS
    for epochs in (1, 2) if quick else (1, 2, 4, 8, 16, 32):
        states = train_all(task, models, epochs)
        for settings, k in widths.items():
            yield from points("epochs", epochs, states, k, (models,), [settings])
    models = 2 if quick else 16
    # The same seeds: models trained longer are later checkpoints of the same runs.
    snapshots = {epoch: train_all(task, models, epoch) for epoch in range(1, task.max_epochs + 1)}
    for runs in (1, 2) if quick else (1, 2, 4, 8, 16):
        last = list(snapshots)[-(models // runs) :]
        states = [snapshots[epoch][run] for run in range(runs) for epoch in last]
        for settings, k in widths.items():
            yield from points("runs", runs, states, k, (models,), [settings])


def tables(found: list[Result], ceiling: float) -> str:
    """Markdown: a table for each ablation, the literature's numbers below ours."""
    lines = [f"Noise ceiling {ceiling:.3f}.\n"]
    for ablation in dict.fromkeys(point.ablation for point in found):
        points = [point for point in found if point.ablation == ablation]
        places = sorted({point.x for point in points} | {*LITERATURE.get(ablation, ("", {}))[1]})
        lines += [f"| {ablation} | M | {' | '.join(map(str, places))} |", "|---" * (2 + len(places)) + "|"]
        for settings, models in dict.fromkeys((point.settings, point.models) for point in points):
            cells = {point.x: point for point in points if (point.settings, point.models) == (settings, models)}
            texts = [_cell(cells[x]) if x in cells else "" for x in places]
            lines.append(f"| {settings} | {models} | {' | '.join(texts)} |")
        if ablation in LITERATURE:
            name, values = LITERATURE[ablation]
            texts = [f"{values[x]:.3f}" if x in values else "" for x in places]
            lines.append(f"| {name} (Park et al. 2023) | 100 | {' | '.join(texts)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(point: Result) -> str:
    if point.lds is None or point.low is None or point.high is None:
        return "singular"
    return f"{point.lds:.3f} ± {(point.high - point.low) / 2:.3f}"


def plot(found: list[Result], ceiling: float, path: Path) -> None:
    """LDS against k, epochs and runs: a panel each."""
    titles = {"k": "features k", "epochs": "epochs of training", "runs": "independent runs"}
    figure, axes = plt.subplots(1, len(titles), figsize=(15, 5.2), sharey=True)
    for axis, (ablation, title) in zip(axes, titles.items(), strict=True):
        points = [point for point in found if point.ablation == ablation and point.lds is not None]
        counts = sorted({point.models for point in points})
        for settings, style, shade in (("defaults", "o-", plt.cm.Reds), ("published", "s--", plt.cm.Blues)):
            for number, count in enumerate(counts):
                line = [point for point in points if (point.settings, point.models) == (settings, count)]
                x, y = [point.x for point in line], [point.lds for point in line]
                colour = shade(0.45 + 0.5 * (number + 1) / len(counts))
                axis.plot(x, y, style, color=colour, label=f"{settings}, M = {count}", markersize=5)
                axis.fill_between(x, [p.low for p in line], [p.high for p in line], color=colour, alpha=0.1)
        if ablation in LITERATURE:
            name, values = LITERATURE[ablation]
            axis.plot([*values], [*values.values()], "d:", color="dimgrey", label=f"{name} [Park et al. 2023]")
        axis.axhline(ceiling, color="black", linestyle="--", linewidth=0.8, label="noise ceiling")
        axis.set(xscale="log", xlabel=title)
        ticks = sorted({point.x for point in points} | {*LITERATURE.get(ablation, ("", {}))[1]})
        axis.set_xticks([tick for tick in ticks if tick not in (6, 15)], minor=False)
        axis.set_xticklabels([str(tick) for tick in ticks if tick not in (6, 15)], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, fontsize=8, frameon=False)
    axes[0].set_ylabel("LDS")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = options(__doc__, "ablations_output", quick="a tiny net, 200 digits, 20 halves")
    args = begin(parser, arguments)
    task = make_tasks()[TASK]
    task = small(task) if args.quick else task
    truth = kept(args.out, task, *((20, 2, 2) if args.quick else (SUBSETS, SEEDS[TASK], MODELS)))
    ceiling = float(truth.measure(torch.zeros(len(task.targets), len(task.train))).noise_ceiling())
    found: list[Result] = []
    for point in tqdm(ablations(task, truth, args.quick)):
        found.append(point)
        written = {"noise_ceiling": ceiling, "literature": LITERATURE, "results": [asdict(p) for p in found]}
        (args.out / "ablations.json").write_text(json.dumps(written, indent=1))
    (args.out / "ablations.md").write_text(tables(found, ceiling))
    plot(found, ceiling, args.out / "ablations.png")
    print(tables(found, ceiling))


if __name__ == "__main__":
    main()
