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
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.audit import audit
from benchmarks.fleet import fleet
from benchmarks.memory import MIB, fresh_peak
from benchmarks.models import WORKLOADS, Precision, resnet9
from benchmarks.one_run_cost import one_run
from benchmarks.ours import K, featurizer, settings
from benchmarks.peers import FEATURIZERS, SCORES, package_of
from benchmarks.storage import scoring, topk
from benchmarks.timing import Action, Row, Run, ratios, rows, seconds, table
from benchmarks.whole import whole
from examples.digits import LitDigits, make_data, make_trainer
from lightning_trak import TRAK, LinearDatamodelingScore
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import KroneckerProjection, Projection, SparseProjection
from lightning_trak.retraining import RetrainingFleet, random_subsets

PLAIN = "of forward + backward"


def _absent(name: str) -> str | None:
    package = package_of(name)
    return None if importlib.util.find_spec(package) else f"skipped: {package} is not installed"


# Batch sizes of each part: timed on a CPU or on a GPU, and where memory is measured.
CPU_SIZES = {"resnet9": 32, "gpt2, 6 layers": 8}
GPU_SIZES = {"resnet9": 512, "gpt2, 6 layers": 64, "resnet18": 128, "gpt2": 32}
MEMORY_SIZES = {"resnet9": 128, "gpt2, 6 layers": 8}


def batch(run: Run) -> list[Row]:
    """Features of a batch, from its gradients. On a GPU also the time of the plain pass in the same precision."""
    found = []
    on_gpu = run.device.type == "cuda"
    for name, size in (GPU_SIZES if on_gpu else CPU_SIZES).items():
        if name != "resnet9" and not importlib.util.find_spec("transformers"):
            found.append(Row("batch", name, None, PLAIN, repetitions=0, note="transformers is not installed"))
            continue
        work = WORKLOADS[name](size).to(run.device)
        options = settings(4096 if on_gpu else K)
        if on_gpu:
            del options["vmap + SparseProjection"]  # it would hold the gradients of all examples
        actions: dict[str, Action] = {key: featurizer(work, setting) for key, setting in options.items()}
        actions["forward + activations' gradients alone"] = work.activations
        below: dict[Precision, str] = {
            precision: f"forward + backward, {precision}" for precision in ("bf16-mixed", "bf16-true")
        }
        actions |= {name: work.to(run.device, precision).plain for precision, name in below.items()}
        measured = ratios(work.plain, actions, run.repetitions)
        unit = statistics.median(seconds(work.plain) for _ in range(run.repetitions))
        rates = {key: f"{work.count / unit / statistics.median(r):.4g} {work.unit}/s" for key, r in measured.items()}
        for key, setting in options.items():
            if setting.precision in below:
                pairs = zip(measured[key], measured[below[setting.precision]], strict=True)
                measured[f"{key}, against {setting.precision}"] = [ratio / plain for ratio, plain in pairs]
        named = {f"{name}: {key}": values for key, values in measured.items()}
        found += rows("batch", named, PLAIN, {f"{name}: {key}": rate for key, rate in rates.items()})
    return found


def memory(run: Run) -> list[Row]:
    """Peak memory of the same settings on a CPU, and of a training step, each in a new process."""
    found = []
    for workload, size in MEMORY_SIZES.items():
        if workload != "resnet9" and not importlib.util.find_spec("transformers"):
            continue
        for name in ("training step", *settings()):
            peaks = [fresh_peak(workload, size, name) / MIB for _ in range(min(run.repetitions, 3))]
            value = statistics.median(peaks)
            note = f"batch of {size}"
            found.append(Row("memory", f"{workload}: {name}", value, "MiB", min(peaks), max(peaks), len(peaks), note))
    return found


def peers(run: Run) -> list[Row]:
    """Other packages on ResNet-9, each beside forward and backward passes of the examples that it processes."""
    work = resnet9(32)
    unit = statistics.median(seconds(work.plain) for _ in range(5))
    found = rows(
        "peers",
        ratios(
            work.plain, {f"lightning-trak {name}": featurizer(work, setting) for name, setting in settings().items()}
        ),
        PLAIN,
        dict.fromkeys((f"lightning-trak {name}" for name in settings()), "featurize 32 examples"),
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
    with tempfile.TemporaryDirectory(dir=run.out) as folder:
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


def lds(run: Run, subsets: int = 40, k: int = 1024) -> list[Row]:
    """LDS and time of scores for one model of the digits."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    train, targets = make_data()
    torch.manual_seed(0)
    trained = LitDigits()
    make_trainer().fit(trained, DataLoader(train, batch_size=100, shuffle=True))
    model = trained.net.eval()
    masks = random_subsets(len(train), subsets, seed=1)
    with tempfile.TemporaryDirectory(dir=run.out) as folder:
        retrained = RetrainingFleet(folder, LitDigits, make_trainer, DataLoader(train, batch_size=100), targets, masks)
        retrained.run()
        outputs = retrained.outputs
    kronecker = KroneckerProjection(16, 16)
    ours: dict[str, dict[str, Any]] = {
        "lightning-trak": {"projection": SparseProjection(k)},
        "lightning-trak, bf16-mixed": {"projection": SparseProjection(k), "precision": "bf16-mixed"},
        "lightning-trak, bf16-true": {"projection": SparseProjection(k), "precision": "bf16-true"},
        "lightning-trak, Kronecker": {"projection": kronecker},
        "lightning-trak, Kronecker, bf16-mixed": {"projection": kronecker, "precision": "bf16-mixed"},
        "lightning-trak, Kronecker, bf16-true": {"projection": kronecker, "precision": "bf16-true"},
    }
    methods: dict[str, Callable[[], Tensor]] = {
        name: lambda options=options: _our_scores(run.out, model, train, targets, **options)
        for name, options in ours.items()
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
    times = ratios(baseline, methods, min(run.repetitions, 3))
    return found + skipped + rows("lds", times, "of the time of lightning-trak, features and scores")


def _our_scores(
    out: Path,
    model: nn.Module,
    train: TensorDataset,
    targets: TensorDataset,
    projection: Projection,
    precision: Precision = "32-true",
) -> Tensor:
    """Featurize and score as users do, with a Trainer and a store on disk."""
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with tempfile.TemporaryDirectory(dir=out) as folder:
        trak = TRAK(model, [model.state_dict()], folder, output=ClassificationMargin(), projection=projection)
        trak.featurize(trainer, DataLoader(train, batch_size=100))
        return trak.score(trainer, DataLoader(targets, batch_size=100))


PARTS = {
    "featurize": whole,
    "batch": batch,
    "memory": memory,
    "scoring": scoring,
    "lds": lds,
    "peers": peers,
    "topk": topk,
    "fleet": fleet,
    "audit": audit,
    "one_run": one_run,
}


GPU_PARTS = ("batch", "featurize", "scoring", "one_run")


def main() -> None:
    """Run the given parts. Print a table of each, and write it as JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("speed_output"), help="folder to write the tables to")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--device", type=torch.device, default="cpu", help=f"cpu or cuda (parts {', '.join(GPU_PARTS)})"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="rounds of alternating measurements")
    parser.add_argument("--quick", action="store_true", help="less work in the parts featurize and one_run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*|.*does not have many workers.*")  # from Lightning itself
    run = Run(args.out, args.repetitions, torch.device(args.device), args.quick)
    if run.device.type == "cuda" and not set(args.parts) <= set(GPU_PARTS):
        parser.error(f"on a GPU, --parts can be {', '.join(GPU_PARTS)}")
    name = torch.cuda.get_device_name() if run.device.type == "cuda" else platform.processor()
    machine = {
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    for part in args.parts:
        measured = PARTS[part](run)
        content = machine | {"rows": [asdict(row) for row in measured]}
        (args.out / f"{part}.json").write_text(json.dumps(content, indent=2) + "\n")
        (args.out / f"{part}.md").write_text(table(measured) + "\n")
        print(table(measured), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
