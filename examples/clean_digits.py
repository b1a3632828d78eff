"""Which digits have a wrong label, do harm, come twice, or are enough to train on?

A tenth of the labels of scikit-learn's digits are made wrong, and forty of the images are noisy copies of others. A
perceptron is trained on them, and methods look for the wrong labels: how many are among the tenth of the images that
they find most suspicious? Then the copies are looked for, and new models are trained without the suspects, and on the
images that are most useful.

    python -m examples.clean_digits
"""

import argparse
import time
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from examples.common import begin
from examples.counterfactuals import DigitsMLP
from examples.digits import make_data, make_trainer
from lightning_trak import TRAK, GradientCosine, GradientDot, Metagradient, TracIn, TrainingRecorder, TRAKCallback
from lightning_trak.cleaning import Ranking, duplicates, harmful, useful, wrong_labels
from lightning_trak.methods import (
    EKFACInfluence,
    ExactKernel,
    InfluenceFunction,
    KNNShapley,
    LabelStatistic,
    RandomScores,
    RepresentationSimilarity,
    TrainingLoss,
)
from lightning_trak.metrics.functional import DetectionCurve, bootstrap_interval, flip_labels
from lightning_trak.projections import SparseProjection
from lightning_trak.reporting.plots import plot_mislabel_curves

COPIES, INSPECTED = 40, 0.1


def spoil(train: TensorDataset, fraction: float, seed: int) -> tuple[TensorDataset, Tensor]:
    """Replace the last images by noisy copies of the first, and give some images a wrong label."""
    images, labels = (part.clone() for part in train.tensors)
    noise = 0.03 * torch.randn(images[:COPIES].shape, generator=torch.Generator().manual_seed(seed))
    images[-COPIES:] = (images[:COPIES] + noise).clamp(0, 1)
    labels[-COPIES:] = labels[:COPIES]
    labels, wrong = flip_labels(labels, fraction, seed)
    return TensorDataset(images, labels), wrong


def train_on(data: TensorDataset | Subset, seed: int, *callbacks: L.Callback) -> DigitsMLP:
    """A model trained on some images."""
    L.seed_everything(seed, verbose=False)
    model = DigitsMLP()
    make_trainer(*callbacks).fit(model, DataLoader(data, batch_size=100, shuffle=True))
    return model


def accuracy(model: DigitsMLP, data: Subset) -> float:
    images, labels = data.dataset.tensors
    with torch.no_grad():
        predicted = model(images[data.indices]).argmax(1)
    return float((predicted == labels[data.indices]).double().mean())


def make_methods(model: DigitsMLP, run: Path, seed: int, slow: bool) -> dict[str, LabelStatistic]:
    """The methods that look for wrong labels. Three use one store."""
    store = {"checkpoints": run / "snapshots", "store": run / "features", "projection": SparseProjection(2048)}
    methods: dict[str, LabelStatistic] = {
        "TRAK": TRAK(model, **store),
        "ExactKernel": ExactKernel(model, run / "snapshots", run / "kernel"),
        "TracIn": TracIn(model, **store),
        "GradientDot": GradientDot(model, **store),
        "GradientCosine": GradientCosine(model, **store),
        "EKFACInfluence": EKFACInfluence(model, run / "snapshots"),
        "RepresentationSimilarity": RepresentationSimilarity(model, run / "snapshots"),
        "KNNShapley": KNNShapley(model, run / "snapshots"),
        "TrainingLoss": TrainingLoss(model, run / "snapshots"),
        "RandomScores": RandomScores(seed),
    }
    if slow:  # each training image is a target
        methods["InfluenceFunction"] = InfluenceFunction(model, run / "snapshots")
        methods["Metagradient"] = Metagradient(model, run / "recording", progress_bar=False)
    return methods


def look_for_wrong_labels(
    train: TensorDataset, validation: Subset, test: Subset, run: Path, seed: int, args: argparse.Namespace
) -> tuple[dict[str, DetectionCurve], dict[str, float]]:
    """The detection curve of each method, and accuracies of models trained on parts of the data."""
    spoilt, wrong = spoil(train, args.fraction, seed)
    loader, trainer = DataLoader(spoilt, batch_size=100), make_trainer()
    callbacks = [TRAKCallback(run / "snapshots", every_n_epochs=4)]
    if args.slow:
        callbacks.append(TrainingRecorder(run / "recording"))
    model = train_on(spoilt, seed, *callbacks)
    methods = make_methods(model, run, seed, args.slow)
    rankings = {name: wrong_labels(method, trainer, loader) for name, method in methods.items()}
    rankings["TRAK, harmful"] = harmful(methods["TRAK"], trainer, loader, validation)
    rankings["TRAK"][: round(INSPECTED * len(spoilt))].to_csv(run / "suspects.csv")

    for name, threshold in (("TRAK", 0.97), ("RepresentationSimilarity", 0.999)):
        copies = duplicates(methods[name], trainer, loader, threshold)
        copies.to_csv(run / f"copies-{name}.csv")
        found, others = count_copies(copies, len(spoilt))
        print(f"   duplicates by {name}: {found} of {COPIES} copies, and {others} other groups", flush=True)

    best = useful(methods["TRAK"], trainer, loader, validation, groups=spoilt.tensors[1])
    fifth, tenth = len(spoilt) // 5, round(INSPECTED * len(spoilt))
    best[:fifth].to_csv(run / "selected.csv")
    order = torch.randperm(len(spoilt), generator=torch.Generator().manual_seed(seed))
    parts = {
        "all images": order,
        "without the tenth that TRAK suspects": rankings["TRAK"][tenth:].positions,
        "without a random tenth": order[tenth:],
        "the most useful four fifths": best[: 4 * fifth].positions,
        "random four fifths": order[: 4 * fifth],
        "the most useful fifth": best[:fifth].positions,
        "a random fifth": order[:fifth],
    }
    accuracies = {
        name: accuracy(train_on(Subset(spoilt, sorted(part.tolist())), seed), test) for name, part in parts.items()
    }
    return {name: ranking.curve(wrong) for name, ranking in rankings.items()}, accuracies


def count_copies(copies: Ranking, count: int) -> tuple[int, int]:
    """How many copies are in a group with their original, and how many groups there are beside those."""
    group = dict(zip(copies.positions.tolist(), copies.groups, strict=True))
    pairs = [(group.get(original), group.get(count - COPIES + original)) for original in range(COPIES)]
    found = [one for one, other in pairs if one is not None and one == other]
    return len(found), len(set(group.values()) - set(found))


def summary(values: list[float]) -> str:
    """The mean over seeds, and its interval."""
    numbers = torch.tensor([values], dtype=torch.float64)
    mean = f"{float(numbers.mean()):4.0%}"
    if len(values) < 2:
        return mean
    low, high = (float(end) for end in bootstrap_interval(numbers))
    return f"{mean}  ({low:.0%} to {high:.0%})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output/clean"), help="where everything is written")
    parser.add_argument("--images", type=int, default=1500, help="training images")
    parser.add_argument("--fraction", type=float, default=0.1, help="of the labels are made wrong")
    parser.add_argument("--seeds", type=int, default=3, help="how often all is done, with other labels and models")
    parser.add_argument("--slow", action="store_true", help="with InfluenceFunction and Metagradient")
    args = parser.parse_args(arguments)
    started = time.time()
    run = begin(args.out)
    train, held_out = make_data()
    train = TensorDataset(*(part[: args.images] for part in train.tensors))
    half = len(held_out) // 2
    validation, test = Subset(held_out, range(half)), Subset(held_out, range(half, len(held_out)))
    results = []
    for seed in range(args.seeds):
        print(f"{seed + 1}. {len(train)} digits, {args.fraction:.0%} with a wrong label", flush=True)
        results.append(look_for_wrong_labels(train, validation, test, run / f"seed-{seed}", seed, args))
    print(f"Wrong labels found in the first {INSPECTED:.0%} of the images (95% interval over {args.seeds} seeds)")
    for name in results[0][0]:
        print(f"   {name:40s} {summary([curves[name].found_within(INSPECTED) for curves, _ in results])}")
    print("Correct predictions for other images after training on")
    for name in results[0][1]:
        print(f"   {name:40s} {summary([accuracies[name] for _, accuracies in results])}")
    plot_mislabel_curves(results[0][0]).savefig(run / "found.png", dpi=150)
    print(f"Wrote tables and {run}/found.png in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
