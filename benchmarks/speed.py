"""How fast features, scores and top-k are, as ratios measured in one process; see README.md in this folder."""

import argparse
import importlib.util
import json
import logging
import platform
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.fleet import fleet
from benchmarks.memory import MIB, fresh_peak
from benchmarks.models import WORKLOADS, resnet9
from benchmarks.ours import SETTINGS, K, featurizer
from benchmarks.peers import FEATURIZERS, SCORES, package_of
from benchmarks.storage import scoring, topk
from benchmarks.timing import Row, ratios, rows, seconds, table
from examples.digits import LitDigits, make_data, make_trainer
from lightning_trak import TRAK, LinearDatamodelingScore
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import KroneckerProjection, SparseProjection
from lightning_trak.retraining import RetrainingFleet, random_subsets

PLAIN = "of forward + backward"


def _absent(name: str) -> str | None:
    package = package_of(name)
    return None if importlib.util.find_spec(package) else f"skipped: {package} is not installed"


def featurize(_: Path, repetitions: int) -> list[Row]:
    """Features of a batch, from its gradients."""
    found = []
    for workload, make in WORKLOADS.items():
        if workload == "gpt2" and not importlib.util.find_spec("transformers"):
            found.append(Row("featurize", workload, None, PLAIN, repetitions=0, note="transformers is not installed"))
            continue
        work = make({"resnet9": 32, "gpt2": 8}[workload])
        actions = {f"{workload}: {name}": featurizer(work, *setting) for name, setting in SETTINGS.items()}
        notes = {name: f"k = {action().features.shape[1]}" for name, action in actions.items()}
        found += rows("featurize", ratios(work.plain, actions, repetitions), PLAIN, notes)
    return found


def memory(_: Path, repetitions: int) -> list[Row]:
    """Peak memory of the same, each in a fresh process, beside that of a training step."""
    found = []
    for workload, size in (("resnet9", 128), ("gpt2", 32)):
        if workload == "gpt2" and not importlib.util.find_spec("transformers"):
            continue
        for name in ("training step", *SETTINGS):
            peaks = [fresh_peak(workload, size, name) / MIB for _ in range(min(repetitions, 3))]
            value = statistics.median(peaks)
            note = f"batch of {size}"
            found.append(Row("memory", f"{workload}: {name}", value, "MiB", min(peaks), max(peaks), len(peaks), note))
    return found


def peers(out: Path, _: int) -> list[Row]:
    """Other packages on ResNet-9, one at a time beside forward + backward of the examples that each goes through."""
    work = resnet9(32)
    unit = statistics.median(seconds(work.plain) for _ in range(5))
    found = rows(
        "peers",
        ratios(
            work.plain, {f"lightning-trak {name}": featurizer(work, *setting) for name, setting in SETTINGS.items()}
        ),
        PLAIN,
        dict.fromkeys((f"lightning-trak {name}" for name in SETTINGS), "featurize 32 examples"),
    )

    def once(action: Callable[[], object], examples: int) -> float:
        before = seconds(work.plain)
        taken = seconds(action)
        return taken / ((before + seconds(work.plain)) / 2) * work.size / examples

    def row(name: str, action: Callable[[], object], examples: int, what: str) -> Row:
        values = [once(action, examples)]
        if values[0] * unit < 20:
            values += [once(action, examples) for _ in range(2)]
        print(name, values, flush=True)
        return Row("peers", name, statistics.median(values), PLAIN, min(values), max(values), len(values), what)

    data = TensorDataset(*work.batch)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        for name in dict.fromkeys((*FEATURIZERS, *SCORES)):
            if reason := _absent(name):
                found.append(Row("peers", name, None, PLAIN, repetitions=0, note=reason))
            elif name in FEATURIZERS:
                action = FEATURIZERS[name](work, K, Path(folder))
                found.append(row(name, action, work.size, "featurize 32 examples"))
            else:
                action = lambda name=name: SCORES[name](work.model, data, data, K)  # noqa: E731
                found.append(row(name, action, 2 * work.size, "score 32 targets x 32 examples"))
    return found


def lds(out: Path, repetitions: int, subsets: int = 40, k: int = 1024) -> list[Row]:
    """How faithful scores of one model of the digits are, and what they cost."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    train, targets = make_data()
    torch.manual_seed(0)
    trained = LitDigits()
    make_trainer().fit(trained, DataLoader(train, batch_size=100, shuffle=True))
    model = trained.net.eval()
    masks = random_subsets(len(train), subsets, seed=1)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        retrained = RetrainingFleet(folder, LitDigits, make_trainer, DataLoader(train, batch_size=100), targets, masks)
        retrained.run()
        outputs = retrained.outputs
    projection = SparseProjection(k)
    methods: dict[str, Callable[[], Tensor]] = {
        "lightning-trak": lambda: _our_scores(out, model, train, targets, projection=projection),
        "lightning-trak, hooks": lambda: _our_scores(out, model, train, targets, projection=projection, engine="hooks"),
        "lightning-trak, hooks + Kronecker": lambda: _our_scores(
            out, model, train, targets, projection=KroneckerProjection(16, 16), engine="hooks"
        ),
    }
    skipped = []
    for name, score in SCORES.items():
        if reason := _absent(name):
            skipped.append(Row("lds", name, None, "LDS", repetitions=0, note=reason))
        else:
            methods[name] = lambda score=score: score(model, train, targets, k)
    found = []
    for name, method in methods.items():
        metric = LinearDatamodelingScore(masks)
        metric.update(method().detach().float(), outputs)
        low, high = metric.interval()
        found.append(Row("lds", name, float(metric.compute()), "LDS", float(low), float(high)))
    baseline = methods.pop("lightning-trak")
    times = ratios(baseline, methods, min(repetitions, 3))
    return found + skipped + rows("lds", times, "of the time of lightning-trak, features and scores")


def _our_scores(out: Path, model: nn.Module, train: TensorDataset, targets: TensorDataset, **options: object) -> Tensor:
    """Featurize and score as users do, with a Trainer and a store on disk."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        trak = TRAK(model, [model.state_dict()], folder, output=ClassificationMargin(), **options)
        trak.featurize(trainer, DataLoader(train, batch_size=100))
        return trak.score(trainer, DataLoader(targets, batch_size=100))


PARTS = {
    "featurize": featurize,
    "memory": memory,
    "scoring": scoring,
    "lds": lds,
    "peers": peers,
    "topk": topk,
    "fleet": fleet,
}


def main() -> None:
    """Run the parts that were asked for; print a table, and write one JSON file for each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("speed_output"), help="folder of the JSON files")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repetitions", type=int, default=5, help="rounds of alternating measurements")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*LeafSpec.*|.*does not have many workers.*")  # Lightning's own
    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    found = []
    for part in args.parts:
        measured = PARTS[part](args.out, args.repetitions)
        content = machine | {"rows": [asdict(row) for row in measured]}
        (args.out / f"{part}.json").write_text(json.dumps(content, indent=2) + "\n")
        print(table(measured), flush=True)
        found += measured
    if len(args.parts) > 1:
        print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
