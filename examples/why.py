"""Why did the model predict this, why a 3 rather than an 8, and how much does each class of the training data count?

A small convolutional net learns scikit-learn's handwritten digits. Its store of features then answers several
questions: with the model's own predictions, with the difference of two classes, with sums over groups, and of images
that are not in the training data.

    python -m examples.why
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from examples import common, digits
from lightning_trak import TRAK, TRAKCallback
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from lightning_trak.reporting.plots import Picture, plot_pictures
from lightning_trak.reporting.shares import shares_table
from lightning_trak.scoring import BothEnds, Groups


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output/why"), help="where everything is written")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of training")
    args = parser.parse_args(arguments)
    run = common.begin(args.out)
    train, targets = digits.make_data()
    train, targets = (
        TensorDataset(*(part[:size] for part in data.tensors))
        for data, size in ((train, digits.NUM_TRAIN), (targets, digits.NUM_TARGETS))
    )
    L.seed_everything(0, verbose=False)
    model = digits.LitDigits()
    trainer = common.make_trainer(args.epochs, TRAKCallback(run / "snapshots", every_n_epochs=args.epochs))
    trainer.fit(model, DataLoader(train, batch_size=100, shuffle=True))
    trak = TRAK(model, run / "snapshots", run / "features", projection=SparseProjection(1024))
    trak.featurize(trainer, DataLoader(train, batch_size=100))

    images, labels = targets.tensors
    model.eval()
    with torch.no_grad():
        predicted = model(images).argmax(1)
    shown = torch.tensor([int((labels == digit).nonzero()[0]) for digit in (3, 8, 9)])
    titles = [f"predicted {int(label)}" for label in predicted[shown]]

    print("1. Why did the model predict this? The images have no labels here.")
    asked = ClassificationMargin(labels="predicted")
    why = trak.score(trainer, TensorDataset(images[shown]), top_k=5, output=asked)
    report(why, train, titles)
    draw(why, train, images[shown], titles).savefig(run / "why.png", dpi=150)

    print("2. Why a 3 rather than an 8?")
    threes = images[labels == 3][:3]
    rather = trak.score(trainer, TensorDataset(threes), top_k=5, output=ClassificationMargin(labels=3, against=8))
    titles = ["3 rather than 8"] * len(threes)
    report(rather, train, titles)
    draw(rather, train, threes, titles).savefig(run / "rather.png", dpi=150)

    print("3. How much does each class of the training data count for the held-out 3s?")
    classes = Groups(train.tensors[1])
    all_threes = TensorDataset(images[labels == 3])
    shares = trak.score(trainer, all_threes, train_groups=classes, output=ClassificationMargin(labels=3))
    print(shares_table(shares, classes).markdown())

    print("4. Which training images helped the held-out set as a whole, and which hurt it?")
    useful, low, high = trak.score(trainer, targets, top_k=5, aggregate="mean", interval=0.95)
    report(useful, train, ["all held-out images"])
    first, last = (float(end.proponents.values[0, 0]) for end in (low, high))
    print(f"      The mean of the first is in {first:+.2g} to {last:+.2g} (95%, over other held-out images)")

    print("5. Which new images would help it most? Here half of the held-out images are candidates for training.")
    half = len(targets) // 2
    candidates, rest = Subset(targets, range(half)), Subset(targets, range(half, len(targets)))
    gains = trak.score(trainer, rest, top_k=5, train=candidates, aggregate="mean")
    report(gains, TensorDataset(images[:half], labels[:half]), ["the other half"])
    print(f"Wrote {run}/why.png and {run}/rather.png")


def report(ends: BothEnds, train: TensorDataset, titles: list[str]) -> None:
    """Print the labels and scores of the strongest proponents and opponents."""
    for row, title in enumerate(titles):
        print(f"   {title}:")
        for kind, end in ends._asdict().items():
            pairs = zip(end.indices[row].tolist(), end.values[row].tolist(), strict=True)
            print(
                f"      {kind:10s} " + ", ".join(f"#{i} (a {train.tensors[1][i]}) {value:+.2g}" for i, value in pairs)
            )


def draw(ends: BothEnds, train: TensorDataset, images: Tensor, titles: list[str]):
    """Each image beside its strongest proponents and opponents."""
    rows = {
        kind: [
            [
                Picture(train.tensors[0][i], f"a {train.tensors[1][i]}\n{value:+.2g}")
                for i, value in zip(end.indices[row].tolist(), end.values[row].tolist(), strict=True)
            ]
            for row in range(len(images))
        ]
        for kind, end in ends._asdict().items()
    }
    return plot_pictures([Picture(image, title) for image, title in zip(images, titles, strict=True)], rows)


if __name__ == "__main__":
    main()
