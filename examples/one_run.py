"""What did each example do in this training run? Take some away, repeat the run, and compare.

A small smooth perceptron learns scikit-learn's handwritten digits while `TrainingRecorder` records the run.
`Metagradient` differentiates the run: it predicts how the outputs at held-out digits change when some training images
are taken away. Then the same run is repeated without random hundredths and tenths of the training images, and the
changes are compared with those that metagradients and TRAK predict.

    python -m examples.one_run
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from examples.common import begin
from examples.counterfactuals import margins
from examples.digits import EPOCHS, LitDigits, make_data, make_trainer
from lightning_trak import TRAK, Metagradient, TrainingRecorder, TRAKCallback
from lightning_trak.retraining import RecordedFleet, random_removals

FRACTIONS = (0.01, 0.1)
COLOURS = {"Metagradient": "tab:blue", "TRAK": "tab:orange"}


class SmoothMLP(LitDigits):
    """A perceptron with a smooth activation and a small learning rate: small changes of the data change it little."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def picture(
    predicted: dict[str, Sequence[Tensor]], changes: Sequence[Tensor], shown: Sequence[int], names: Sequence[str]
) -> Figure:
    """Predicted changes against those of repeated runs: a row for each fraction, a column for each target.

    There is a point for each subset and method. On the line, the prediction is right.

    Args:
        predicted: by method and then by fraction, ``(num_targets, num_subsets)``.
        changes: those of repeated runs, by fraction.
        shown: targets.
        names: what stands above their columns.
    """
    figure = Figure(figsize=(3.2 * len(shown), 3 * len(changes)), layout="constrained")
    axes = figure.subplots(len(changes), len(shown), squeeze=False)
    for row, (fraction, change) in enumerate(zip(FRACTIONS, changes, strict=True)):
        for axis, target, name in zip(axes[row], shown, names, strict=True):
            for method, values in predicted.items():
                axis.scatter(values[row][target], change[target], s=16, alpha=0.7, color=COLOURS[method], label=method)
            axis.axline((0, 0), slope=1, color="grey", linewidth=0.8, zorder=0)
            axis.set_title(f"{name}, {fraction:.0%} removed", fontsize=9)
    figure.supxlabel("predicted change of the output")
    figure.supylabel("change when the run is repeated")
    axes[0][0].legend(fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output/one_run"), help="where everything is written")
    parser.add_argument("--targets", type=int, default=20, help="held-out digits to attribute")
    parser.add_argument("--subsets", type=int, default=15, help="repeated runs for each fraction that is removed")
    args = parser.parse_args(arguments)
    started = time.time()
    train, held_out = make_data()
    if not 2 <= args.targets <= len(held_out) or args.subsets < 3:
        parser.error(f"an LDS with an interval needs 2 to {len(held_out)} --targets and at least 3 --subsets")
    run = begin(args.out)
    targets = Subset(held_out, range(args.targets))
    labels = held_out.tensors[1]
    loader = DataLoader(train, batch_size=100)

    print(f"1. Training on {len(train)} digits, and recording the run", flush=True)
    L.seed_everything(0, verbose=False)
    model = SmoothMLP()
    snapshots = TRAKCallback(run / "snapshots", every_n_epochs=EPOCHS)
    trainer = make_trainer(TrainingRecorder(run / "recording"), snapshots)
    trainer.fit(model, DataLoader(train, batch_size=100, shuffle=True))
    outputs = margins(model, held_out)
    print(f"   {(outputs > 0).float().mean():.1%} of held-out digits have a probability above a half")

    print(f"2. Attributing {len(targets)} held-out digits", flush=True)
    trainer = make_trainer()
    methods = {
        "Metagradient": Metagradient(model, run / "recording", progress_bar=False),
        "TRAK": TRAK(model, run / "snapshots", run / "features"),
    }
    scores = {}
    for name, method in methods.items():
        begun = time.time()
        scores[name] = method.attribute(trainer, loader, targets)
        print(f"   {name:12s} {time.time() - begun:.1f} s", flush=True)

    print(f"3. Repeating the run {len(FRACTIONS) * args.subsets} times, each time without some training images")
    predicted: dict[str, list[Tensor]] = {name: [] for name in scores}
    changes, faithful = [], []
    for fraction in FRACTIONS:
        masks = random_removals(len(train), args.subsets, fraction, seed=1)
        fleet = RecordedFleet(run / f"without-{fraction}", model, run / "recording", trainer, loader, targets, masks)
        fleet.run(together=args.subsets, progress_bar=False)
        changes.append(fleet.outputs.squeeze(2) - outputs[: len(targets), None])
        print(
            f"   {fraction:.0%} removed: outputs change by {changes[-1].square().mean().sqrt():.3f} (root mean square)"
        )
        for name, values in scores.items():
            predicted[name].append(-values @ (~masks).to(values).T)
            lds = fleet.lds(values)
            low, high = lds.interval()
            print(f"      {name:12s} LDS {lds.compute():.3f}  (95% interval {low:.3f} to {high:.3f})", flush=True)
        faithful.append(fleet.lds(scores["Metagradient"]).per_target())

    order = faithful[0].argsort().tolist()
    shown = {"lowest": order[0], "median": order[len(order) // 2], "highest": order[-1]}
    names = [f"a {int(labels[target])}, {kind} LDS" for kind, target in shown.items()]
    picture(predicted, changes, list(shown.values()), names).savefig(run / "changes.png", dpi=150)
    print(f"Wrote {run}/changes.png in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
