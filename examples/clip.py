"""Which pairs taught a CLIP model that this caption belongs to this image?

Two small towers learn to give an image and its caption the same direction. For held-out pairs, TRAK names the training
pairs that count most for and against. A picture shows these beside the nearest neighbours in embedding space. Then
models are trained again without the first of either list, or without random pairs. This measures how far the alignment
(the cosine of the target's image and caption) falls.

Run it as `python -m examples.clip`. With --data, images and captions are read from a directory; examples/pairs.py says
what it holds. Without, scenes of coloured shapes are drawn.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from examples.common import begin, make_trainer
from examples.pairs import Pairs, make_scenes, read_pairs
from lightning_trak import TRAK, AttributionMixin, TRAKCallback
from lightning_trak.methods import RandomScores
from lightning_trak.outputs import ContrastiveMargin, NegativeLoss
from lightning_trak.reporting.plots import plot_brittleness, plot_pictures
from lightning_trak.retraining import Counterfactuals

TEMPERATURE = 0.1
ALIGNED = 0.5  # the cosine above which a pair counts as learned


class LitCLIP(AttributionMixin, L.LightningModule):
    """A convolutional net for images and one for words. Both map into the same space."""

    def __init__(self, num_words: int, dim: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.image = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 48, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(48 * 16, dim),
        )
        self.words = nn.Embedding(num_words, 32)
        self.text = nn.Sequential(
            nn.Conv1d(32, 96, 5, padding=2), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(96, dim)
        )

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        text = self.text(self.words(words).transpose(1, 2))
        return F.normalize(self.image(images), dim=-1), F.normalize(text, dim=-1)

    def configure_model_output(self) -> ContrastiveMargin:
        return ContrastiveMargin(TEMPERATURE)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, texts = self(*batch)
        logits, own = images @ texts.T / TEMPERATURE, torch.arange(len(images), device=self.device)
        return F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.01)


def misalignment(model: nn.Module, pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Minus the cosine of each image and its caption."""
    return -F.cosine_similarity(*model(*pairs))


@torch.no_grad()
def neighbours(model: LitCLIP, train: Pairs, targets: Pairs) -> Tensor:
    """The mean of two cosines, image with image and caption with caption: ``(num_targets, num_train)``."""
    of_train, of_targets = model(train.images, train.words), model(targets.images, targets.words)
    return sum(ours @ theirs.T for ours, theirs in zip(of_targets, of_train, strict=True)) / 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of captions.jsonl and images")
    parser.add_argument("--out", type=Path, default=Path("demo_output/clip"), help="where everything is written")
    parser.add_argument("--scenes", type=int, default=600, help="pairs to draw, without --data")
    parser.add_argument("--size", type=int, default=24, help="width and height of the images that the model sees")
    parser.add_argument("--targets", type=int, default=4, help="held-out pairs to attribute")
    parser.add_argument("--ks", type=int, nargs="+", default=[3, 9, 30], help="how many pairs to remove")
    parser.add_argument("--models", type=int, default=4, help="models that TRAK averages over")
    parser.add_argument("--seeds", type=int, default=2, help="models for each target, method and k")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args(arguments)
    started = time.time()
    run = begin(args.out)
    pairs = read_pairs(args.data) if args.data else (make_scenes(args.scenes, 0.03), make_scenes(200, seed=1))
    train = Pairs(pairs[0], args.size)
    held_out = Pairs(pairs[1], args.size, train.vocabulary)
    make_model = partial(LitCLIP, len(train.vocabulary) + 1)

    print(f"1. Training {args.models} models on {len(train)} pairs", flush=True)
    snapshots = [run / f"snapshots{seed}" for seed in range(args.models)]
    similar, aligned = torch.zeros(len(held_out), len(train)), torch.zeros(len(held_out))
    for seed, directory in enumerate(snapshots):
        L.seed_everything(seed, verbose=False)
        model = make_model()
        callback = TRAKCallback(directory, every_n_epochs=-(-args.epochs // 2))
        make_trainer(args.epochs, callback).fit(model, DataLoader(train, batch_size=64, shuffle=True))
        similar += neighbours(model, train, held_out) / args.models
        with torch.no_grad():
            aligned -= misalignment(model, (held_out.images, held_out.words)) / args.models
    chosen = (aligned > ALIGNED).nonzero().flatten()[: args.targets].tolist()
    learned = int((aligned > ALIGNED).sum())
    print(f"   alignment of {len(held_out)} held-out pairs: {aligned.mean():.2f}, above {ALIGNED} at {learned}")
    if not chosen:
        raise SystemExit("No held-out pair is aligned, so there is nothing to explain: train with more --epochs.")

    print(f"2. Attributing {len(chosen)} of those", flush=True)
    targets, loader, trainer = Subset(held_out, chosen), DataLoader(train, batch_size=64), make_trainer(args.epochs)
    trak = TRAK(model, snapshots, run / "features").attribute(trainer, loader, targets)
    random = RandomScores().attribute(trainer, loader, targets)
    near = similar[chosen]
    shown = {"nearest neighbours": near, "TRAK: most positive": trak, "TRAK: most negative": -trak}
    rows = {
        name: [[*map(train.picture, row)] for row in values.topk(3).indices.tolist()] for name, values in shown.items()
    }
    plot_pictures([*map(held_out.picture, chosen)], rows).savefig(run / "pairs.png", dpi=150)

    print(f"3. Retraining without the first of each list, {args.seeds} times each", flush=True)
    removal = Counterfactuals(
        run / "removed",
        make_model,
        partial(make_trainer, args.epochs),
        loader,
        targets,
        {"TRAK": trak, "nearest neighbours": near, "random": random},
        args.ks,
        num_seeds=args.seeds,
        num_references=3,
        output=NegativeLoss(misalignment),
    )
    removal.run()
    brittleness = removal.brittleness(threshold=ALIGNED)
    print(f"   alignment of the targets, nothing removed: {brittleness.references.mean():.2f}")
    print(brittleness.table().markdown())
    plot_brittleness(brittleness).savefig(run / "alignment.png", dpi=100)
    print(f"Wrote {run}/pairs.png and alignment.png in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
