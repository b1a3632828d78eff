"""The main job on real data: train, attribute, and measure how faithful the attributions are.

A small convolutional net learns scikit-learn's handwritten digits while `TRAKCallback` keeps snapshots. TRAK then
scores every training image for every held-out image. Retraining on random halves of the training set gives the ground
truth. The linear datamodeling score (LDS) compares it with those scores, and with the scores of TRAK as published.

    python -m examples.digits
"""

import argparse
import time
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples import common
from lightning_trak import TRAK, AttributionMixin, LinearDatamodelingScore, TRAKCallback
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from lightning_trak.reporting.plots import plot_attributions
from lightning_trak.retraining import RetrainingFleet, random_subsets

NUM_TRAIN, NUM_TARGETS, EPOCHS = 1500, 297, 16


class LitDigits(AttributionMixin, L.LightningModule):
    """A convolutional net for 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def configure_model_output(self) -> ClassificationMargin:
        return ClassificationMargin()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)


def make_data() -> tuple[TensorDataset, TensorDataset]:
    """Training and target images with their labels, in one fixed random order."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, targets = order[:NUM_TRAIN], order[NUM_TRAIN : NUM_TRAIN + NUM_TARGETS]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[targets], labels[targets])


make_trainer = partial(common.make_trainer, EPOCHS)  # a quiet Trainer, for one of many models


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="where everything is written")
    parser.add_argument("--subsets", type=int, default=40, help="models to retrain for the ground truth")
    parser.add_argument("--k", type=int, default=1024, help="features of an example")
    args = parser.parse_args(arguments)
    started = time.time()
    run = common.begin(args.out, quiet=False)
    train, targets = make_data()
    logger = CSVLogger(run, name="", version="logs")

    print(f"1. Training on {len(train)} digits, with snapshots", flush=True)
    L.seed_everything(0, verbose=False)
    model = LitDigits()
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=logger,
        callbacks=[TRAKCallback(run / "snapshots", every_n_epochs=4)],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=12,
    )
    trainer.fit(model, DataLoader(train, batch_size=100, shuffle=True))

    print(f"2. Attributing {len(targets)} held-out digits", flush=True)
    projection = SparseProjection(args.k)
    trak = TRAK(model, run / "snapshots", run / "features", projection=projection)
    trak.featurize(trainer, DataLoader(train, batch_size=100))
    scores = trak.score(trainer, DataLoader(targets, batch_size=100))
    paper = TRAK.paper(model, run / "snapshots", run / "features", projection=projection)
    paper_scores = paper.score(trainer, DataLoader(targets, batch_size=100))

    print(f"3. Retraining on {args.subsets} random halves", flush=True)
    masks = random_subsets(len(train), args.subsets, fraction=0.5, seed=1)
    fleet = RetrainingFleet(run / "fleet", LitDigits, make_trainer, DataLoader(train, batch_size=100), targets, masks)
    fleet.run()

    print("4. Linear datamodeling score: rank correlation of predicted and retrained outputs")
    measured = {}
    for name, values in (("TRAK", scores), ("TRAK.paper", paper_scores)):
        lds = LinearDatamodelingScore(masks)
        lds.update(values, fleet.outputs)
        low, high = lds.interval()
        measured |= {f"lds/{name}": lds.compute(), f"lds/{name}_low": low, f"lds/{name}_high": high}
        print(f"   {name:12s} LDS {lds.compute():.3f}  (95% interval {low:.3f} to {high:.3f})")
    logger.log_metrics(measured, step=trainer.global_step)
    logger.save()

    print("5. Which training images made the model say this?")
    shown = torch.tensor([int((targets.tensors[1] == digit).nonzero()[0]) for digit in (3, 8, 9)])
    for target in shown.tolist():
        print(f"   held-out image {target}, a {int(targets.tensors[1][target])}:")
        for kind, largest in (("proponents", True), ("opponents", False)):
            values, indices = scores[target].topk(3, largest=largest)
            items = [
                f"#{i} (a {int(train.tensors[1][i])}) {value:+.2g}" for i, value in zip(indices, values, strict=True)
            ]
            print(f"      {kind:10s} {', '.join(items)}")
    figure = plot_attributions(
        targets.tensors[0][shown],
        train.tensors[0],
        scores[shown],
        target_names=[f"a {int(label)}" for label in targets.tensors[1][shown]],
        train_names=[f"a {int(label)}" for label in train.tensors[1]],
    )
    figure.savefig(run / "attributions.png", dpi=150)
    print(f"Wrote {run}/attributions.png and {run}/logs/metrics.csv in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
