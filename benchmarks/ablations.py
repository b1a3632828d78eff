"""What TRAK's score depends on: k, training epochs, and how many runs the checkpoints come from.

    python -m benchmarks.ablations --out ablations_output            # about three minutes
    python -m benchmarks.ablations --out ablations_output --quick    # a tiny net, few models, under a minute

The ablations of TRAK's authors, on handwritten digits and a perceptron, with the published settings and the defaults.
The truth comes from models retrained on random halves. The directory gets `ablations.json`, `ablations.md` (the tables)
and `ablations.png`. It also keeps the truth.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.methods import SEEDS, small
from benchmarks.stores import featurize
from benchmarks.tasks import Task, make_tasks
from benchmarks.truth import MODELS, SUBSETS, Truth, kept, quiet, train_all
from lightning_trak.features.rows import Features
from lightning_trak.projections import SparseProjection
from lightning_trak.scoring.damping import Noise, auto_damping
from lightning_trak.scoring.gram import DampedGram, gram_matrix

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


def scores(settings: str, rows: Features, targets: Tensor) -> Tensor:
    """TRAK's scores at one model, without the factor Q, at the damping of one model: (num_targets, num_train)."""
    curvature = "identity" if settings == "published" else "gauss_newton"
    gram, squared_weights = gram_matrix([rows], curvature, targets.shape[1], torch.device("cpu"))
    noise = Noise(1)
    noise.add(rows.loss_gradients[None], rows.curvatures[None])
    level = noise.levels(weighted=True)[0]
    damping = 0.0 if settings == "published" else auto_damping(gram.trace(), squared_weights, len(gram), level)
    return DampedGram(gram, damping, torch.float32, "features").solve(targets) @ rows.features.T


def curve(
    task: Task, truth: Truth, states: list[dict[str, Tensor]], k: int, counts: tuple[int, ...], chosen: Iterable[str]
) -> Iterator[tuple[str, int, float | None, float | None, float | None]]:
    """LDS and interval of the chosen settings at several numbers of models, from one set of features."""
    with tempfile.TemporaryDirectory() as directory:
        store, targets = featurize(task, states, SparseProjection(k), Path(directory))
        for settings in chosen:
            products = weighted = loss_gradients = torch.zeros(())
            for checkpoint, features in enumerate(targets):
                shards = [store.read(checkpoint, shard) for shard in range(store.num_shards)]
                rows = Features(*map(torch.cat, zip(*shards, strict=True)))
                try:
                    product = scores(settings, rows, features)
                except ValueError:  # the Gram matrix is singular: there is no average with this model
                    yield from ((settings, count, None, None, None) for count in counts if count > checkpoint)
                    break
                products, loss_gradients = products + product, loss_gradients + rows.loss_gradients
                weighted = weighted + product * rows.loss_gradients
                if checkpoint + 1 in counts:
                    lds = truth.measure(products * loss_gradients if settings == "published" else weighted)
                    interval = map(float, lds.interval(num_bootstraps=300))
                    yield settings, checkpoint + 1, float(lds.compute()), *interval


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("ablations_output"), help="where everything is written")
    parser.add_argument("--quick", action="store_true", help="a tiny net, 200 digits, 20 halves")
    args = parser.parse_args(arguments)
    quiet()
    torch.set_num_threads(1)  # the nets are too small for more threads
    args.out.mkdir(parents=True, exist_ok=True)
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
