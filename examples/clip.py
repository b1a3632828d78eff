"""Which pairs taught a CLIP model that this caption belongs to this image?

Two small towers learn to give an image and its caption the same direction. For held-out pairs, TRAK names the training
pairs that count most for and against, which are shown beside the nearest neighbours in embedding space. Then models are
trained again without the first of either list, and without random pairs: how far does the alignment (cosine of the
target's image and caption) fall?

Run it as `python -m examples.clip`. With --data, images and captions are read from a directory; examples/pairs.py says
what it holds. Without, scenes of coloured shapes are drawn.
"""

import argparse
import time
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from examples.common import begin, make_trainer
from examples.pairs import Pairs, draw_pairs, make_scenes, read_pairs
from lightning_trak import TRAK, AttributionMixin, TRAKCallback
from lightning_trak.methods import RandomScores
from lightning_trak.outputs import ContrastiveMargin, ModelOutput
from lightning_trak.retraining import RetrainingFleet

TEMPERATURE, FRACTIONS = 0.1, (0.005, 0.015, 0.05)


class LitCLIP(AttributionMixin, L.LightningModule):
    """A convolutional net for images and one for words, into one space."""

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


class Alignment(ModelOutput):
    """The cosine of an image and its caption."""

    def output(self, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cosine_similarity(*module(*batch))

    def loss(self, output: Tensor) -> Tensor:
        return -output


@torch.no_grad()
def neighbours(model: LitCLIP, train: Pairs, targets: Pairs) -> Tensor:
    """Cosines of image with image and caption with caption, averaged: ``(num_targets, num_train)``."""
    of_train, of_targets = model(train.images, train.words), model(targets.images, targets.words)
    return sum(ours @ theirs.T for ours, theirs in zip(of_targets, of_train, strict=True)) / 2


def without_first(scores: Tensor, counts: list[int]) -> Tensor:
    """The training set without the first of each target, for each count: bool ``(num_targets, counts, num_train)``."""
    ranks = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return ranks[:, None] >= torch.tensor(counts)[:, None]


def draw_fall(fractions: Tensor, before: float, falls: dict[str, Tensor]) -> Figure:
    """Alignment over the share of removed pairs, ``(num_fractions, num_values)``, with standard errors."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, values in falls.items():
        error = values.std(1, correction=0) / max(1, values.shape[1] - 1) ** 0.5
        axis.errorbar((100 * fractions).numpy(), values.mean(1).numpy(), error.numpy(), label=name, marker="o")
    axis.axhline(before, color="grey", linestyle=":", label="nothing removed")
    axis.set(xlabel="removed training pairs, %", ylabel="alignment of the targets", xscale="log")
    axis.set_xticks((100 * fractions).numpy(), [f"{100 * fraction:g}" for fraction in fractions.tolist()])
    axis.minorticks_off()
    axis.legend()
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of captions.jsonl and images")
    parser.add_argument("--out", type=Path, default=Path("clip_output"), help="where everything is written")
    parser.add_argument("--scenes", type=int, default=600, help="pairs to draw, without --data")
    parser.add_argument("--size", type=int, default=24, help="of the images that the model sees")
    parser.add_argument("--targets", type=int, default=4, help="held-out pairs to attribute")
    parser.add_argument("--models", type=int, default=4, help="models that TRAK averages over")
    parser.add_argument("--seeds", type=int, default=2, help="models to retrain for each set of removed pairs")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args(arguments)
    started = time.time()
    run = begin(args.out)
    pairs = read_pairs(args.data) if args.data else (make_scenes(args.scenes, 0.03), make_scenes(200, seed=1))
    train = Pairs(pairs[0], args.size)
    held_out = Pairs(pairs[1], args.size, train.vocabulary)

    def make_model() -> LitCLIP:
        return LitCLIP(len(train.vocabulary) + 1)

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
            aligned += Alignment().output(model, (held_out.images, held_out.words)) / args.models
    chosen = (aligned > 0.5).nonzero().flatten()[: args.targets].tolist()
    print(f"   alignment of {len(held_out)} held-out pairs: {aligned.mean():.2f}, above 0.5 at {(aligned > 0.5).sum()}")
    if not chosen:
        raise SystemExit("No held-out pair is aligned, so there is nothing to explain: train with more --epochs.")

    print(f"2. Attributing {len(chosen)} of those", flush=True)
    targets, loader = Subset(held_out, chosen), DataLoader(train, batch_size=64)
    scores = {
        "TRAK": TRAK(model, snapshots, run / "features").attribute(make_trainer(args.epochs), loader, targets),
        "nearest neighbours": similar[chosen],
        "random": RandomScores().attribute(make_trainer(args.epochs), loader, targets),
    }
    columns = {
        "nearest neighbours": scores["nearest neighbours"],
        "TRAK: most positive": scores["TRAK"],
        "TRAK: most negative": -scores["TRAK"],
    }
    draw_pairs(held_out, train, chosen, columns).savefig(run / "pairs.png", dpi=150)

    print(f"3. Retraining without the first of each list, {args.seeds} times each", flush=True)
    counts = [max(1, round(fraction * len(train))) for fraction in FRACTIONS]
    masks = torch.stack([without_first(values, counts) for values in scores.values()])
    everything = torch.ones(1, len(train), dtype=torch.bool)
    fleet = RetrainingFleet(
        run / "fleet",
        make_model,
        lambda: make_trainer(args.epochs),
        loader,
        targets,
        torch.cat([everything, masks.flatten(0, 2)]),
        num_seeds=args.seeds,
        output=Alignment(),
    )
    fleet.run()
    before = fleet.outputs[:, 0].mean().item()
    # Of a model that was trained without pairs for one target, the alignment of that target.
    outputs = fleet.outputs[:, 1:].unflatten(1, masks.shape[:3]).diagonal(dim1=0, dim2=2)
    outputs = outputs.transpose(2, 3)  # (method, count, target, seed)
    falls = {name: found.flatten(1) for name, found in zip(scores, outputs, strict=True)}
    shares = torch.tensor(counts) / len(train)
    print(f"   alignment of the targets, without {', '.join(f'{share:.1%}' for share in shares.tolist())}")
    print(f"   {'nothing removed':20s} {before:.2f}")
    for name, values in falls.items():
        print(f"   {name:20s} {'   '.join(f'{value:.2f}' for value in values.mean(1).tolist())}")
    draw_fall(shares, before, falls).savefig(run / "alignment.png", dpi=120)
    print(f"Wrote {run}/pairs.png and alignment.png in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
