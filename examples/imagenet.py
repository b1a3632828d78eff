"""Attribution at the scale of ImageNet: ResNet-18, a folder of images for each class, any number of devices.

One run is trained with snapshots, and its features are stored. For each target, the training images with the highest
and lowest scores are found; the whole matrix of scores is never built. If the run was stopped, start it again with
--snapshots: features that are on disk are not computed again.

Run it as `python -m examples.imagenet --data DIR`, with images in DIR/train/CLASS and DIR/val/CLASS; for example
`--devices 8 --strategy ddp --precision bf16-mixed`. Without --data, crops of the two photographs that come with
scikit-learn are written and used.
"""

import argparse
import csv
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import ResNetConfig, ResNetForImageClassification

from examples.images import ImageFolder, write_crops
from lightning_trak import TRAK, AttributionMixin, TRAKCallback
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from lightning_trak.reporting.plots import plot_attributions
from lightning_trak.scoring import TopK


class LitResNet(AttributionMixin, L.LightningModule):
    """ResNet-18, from scratch."""

    def __init__(self, num_classes: int, lr: float, widths: Sequence[int] = (64, 128, 256, 512)) -> None:
        super().__init__()
        self.lr = lr
        config = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[*widths], num_labels=num_classes)
        self.net = ResNetForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).logits

    def configure_model_output(self) -> ClassificationMargin:
        return ClassificationMargin()

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)


def draw(targets: ImageFolder, train: ImageFolder, rows: Sequence[int], best: TopK, worst: TopK) -> Figure:
    """Draw the training images whose scores were kept. Only these images are read."""
    shown = torch.cat([best.indices, worst.indices]).unique()
    between = (best.values[:, -1:] + worst.values[:, -1:]) / 2  # for images that were kept for another target only
    scores = between.repeat(1, len(shown))
    for kept in (worst, best):
        scores.scatter_(1, torch.searchsorted(shown, kept.indices), kept.values)
    return plot_attributions(
        torch.stack([targets.image(row) for row in rows]),
        torch.stack([train.image(index) for index in shown.tolist()]),
        scores,
        best.indices.shape[1],
        [targets.name(row) for row in rows],
        [train.name(index) for index in shown.tolist()],
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory with train/CLASS and val/CLASS")
    parser.add_argument("--out", type=Path, default=Path("demo_output/imagenet"), help="where everything is written")
    parser.add_argument("--snapshots", type=Path, help="snapshots of an earlier run to attribute, without training")
    parser.add_argument("--crops", type=int, default=48, help="training images to cut, without --data")
    parser.add_argument("--size", type=int, default=224, help="width and height of the images that the model sees")
    parser.add_argument("--widths", type=int, nargs=4, default=[64, 128, 256, 512], help="channels of the four stages")
    parser.add_argument("--targets", type=int, default=4, help="images of val to attribute, at equal distances")
    parser.add_argument(
        "--top",
        type=int,
        default=5,
        help="highest and lowest scores to keep for each target",
    )
    parser.add_argument("--k", type=int, default=2048, help="features of an example")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--snapshot-every", type=int, default=3, help="epochs between snapshots")
    parser.add_argument("--lr", type=float, default=0.001)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, for each device")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--precision", default="32-true", help="precision of attribution, such as bf16-mixed")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", ".*LeafSpec.*|.*does not have many workers.*")  # from Lightning itself
    data = args.data or args.out / f"crops-{args.crops}"
    if args.data is None and not data.exists():
        write_crops(data, args.crops)
    train, val = (ImageFolder(data / part, args.size) for part in ("train", "val"))
    rows = torch.linspace(0, len(val) - 1, min(args.targets, len(val))).round().long().tolist()
    loading = {"batch_size": args.batch_size, "num_workers": args.workers}
    devices = {"accelerator": args.accelerator, "devices": args.devices, "strategy": args.strategy, "logger": False}

    L.seed_everything(0, verbose=False)
    model = LitResNet(len(train.classes), args.lr, args.widths)
    snapshots = args.snapshots or args.out / "snapshots"
    if args.snapshots is None:
        callback = TRAKCallback(snapshots, every_n_epochs=args.snapshot_every)
        trainer = L.Trainer(max_epochs=args.epochs, callbacks=[callback], enable_checkpointing=False, **devices)
        trainer.fit(model, DataLoader(train, shuffle=True, **loading))

    trainer = L.Trainer(precision=args.precision, enable_checkpointing=False, **devices)
    trak = TRAK(model, snapshots, args.out / "features", projection=SparseProjection(args.k))
    trak.featurize(trainer, DataLoader(train, **loading))
    targets = DataLoader(Subset(val, rows), **loading)
    best, worst = trak.score(trainer, targets, top_k=args.top)
    if trainer.is_global_zero:
        with (args.out / "top.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("target", "train", "score"))
            for row, *kept in zip(rows, *best, *worst, strict=True):
                for values, indices in (kept[:2], kept[2:]):
                    for value, index in zip(values.tolist(), indices.tolist(), strict=True):
                        table.writerow((val.files[row][0], train.files[index][0], value))
        draw(val, train, rows, best, worst).savefig(args.out / "top.png", dpi=120)
        same = (train.labels[best.indices] == val.labels[rows][:, None]).float().mean()
        print(f"{same:.0%} of the proponents are of the target's class. Wrote top.csv and top.png in {args.out}")


if __name__ == "__main__":
    main()
