"""Are the attributions right? Remove the training examples that they name, and train again.

A perceptron learns scikit-learn's handwritten digits. The targets are some held-out digits that it classifies
correctly. TRAK, two similarities and chance each name the training images that count most for a target. These are
removed, and new models are trained without them. Then some labels are made wrong, to see how soon they are found.

    python -m examples.counterfactuals
"""

import argparse
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from examples.common import begin
from examples.digits import EPOCHS, LitDigits, make_data, make_trainer
from lightning_trak import TRAK, GradientCosine, GradientDot, TRAKCallback
from lightning_trak.methods import RandomScores, RepresentationSimilarity
from lightning_trak.metrics.functional import flip_labels, mislabel_detection_curve
from lightning_trak.reporting.loggers import log_brittleness, log_mislabel_curves
from lightning_trak.retraining import Counterfactuals


class DigitsMLP(LitDigits):
    """A multilayer perceptron for 8 x 8 images, trained like the convolutional net."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )


def train_runs(data: TensorDataset, folder: Path, runs: int) -> tuple[DigitsMLP, list[Path]]:
    """A trained model and the snapshot directories of several runs."""
    folders = [folder / f"snapshots-{run}" for run in range(runs)]
    for run, place in enumerate(folders):
        L.seed_everything(run, verbose=False)
        model, trainer = DigitsMLP(), make_trainer(TRAKCallback(place, every_n_epochs=EPOCHS))
        trainer.fit(model, DataLoader(data, batch_size=100, shuffle=True))
    return model, folders


def margins(model: LitDigits, data: TensorDataset) -> Tensor:
    """Log-odds of each label."""
    with torch.no_grad():
        return model.configure_model_output().output(model, data.tensors)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output/counterfactuals"), help="where everything is written"
    )
    parser.add_argument("--targets", type=int, default=8, help="digits whose proponents are removed")
    parser.add_argument("--ks", type=int, nargs="+", default=[20, 80], help="how many proponents to remove")
    parser.add_argument("--seeds", type=int, default=2, help="models for each target, method and k")
    parser.add_argument("--runs", type=int, default=5, help="models that are attributed")
    args = parser.parse_args(arguments)
    started = time.time()
    run = begin(args.out)
    logger = CSVLogger(run, name="", version="logs")
    train, held_out = make_data()
    loader = DataLoader(train, batch_size=100)

    print(f"1. Training {args.runs} models, and attributing", flush=True)
    model, snapshots = train_runs(train, run / "clean", args.runs)
    right = (margins(model, held_out) > 0).nonzero().flatten()[: args.targets].tolist()
    targets = Subset(held_out, right)
    store = {"checkpoints": snapshots, "store": run / "clean/features"}
    methods = {
        "TRAK": TRAK(model, **store),
        "gradient cosine": GradientCosine(model, **store),
        "representation cosine": RepresentationSimilarity(model, snapshots),
        "random": RandomScores(seed=1),
    }
    trainer = make_trainer()
    scores = {name: method.attribute(trainer, loader, targets) for name, method in methods.items()}

    removal = Counterfactuals(
        run / "removed", DigitsMLP, make_trainer, loader, targets, scores, args.ks, num_seeds=args.seeds
    )
    print(f"2. Training {len(removal.fleet.masks) * args.seeds} models without proponents", flush=True)
    removal.run(together=50)
    brittleness = removal.brittleness()
    print(brittleness.table().markdown())
    log_brittleness([logger], brittleness)

    print("3. Looking for wrong labels: a tenth of them", flush=True)
    labels, wrong = flip_labels(train.tensors[1], fraction=0.1, seed=0)
    spoilt = TensorDataset(train.tensors[0], labels)
    model, snapshots = train_runs(spoilt, run / "spoilt", args.runs)
    store = {"checkpoints": snapshots, "store": run / "spoilt/features"}
    methods = {
        "loss without the image, TRAK": TRAK(model, **store),
        "self-influence, gradient dot": GradientDot(model, **store),
    }
    loader = DataLoader(spoilt, batch_size=100)
    suspicions = {name: method.label_suspicion(trainer, loader) for name, method in methods.items()}
    suspicions["loss"] = -margins(model, spoilt)
    curves = {name: mislabel_detection_curve(values, wrong) for name, values in suspicions.items()}
    for name, curve in curves.items():
        print(f"   {name:30s} area under the detection curve {float(curve.area):.3f}, at best {1 - 0.1 / 2:.3f}")
    log_mislabel_curves([logger], curves)
    print(f"Wrote numbers, tables and pictures to {run}/logs in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
