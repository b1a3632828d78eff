"""Scoring stored features, compared with the bare matrix product of the same shape and with reading the files."""

import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.memory import MIB, reset_peak, sampled, status
from benchmarks.timing import Action, Row, Run, ratios, rows, seconds
from lightning_trak.features.dtypes import DtypeName, feature_dtype
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.scoring import PrimalScorer

TARGETS, K = 256, 2048


def make_store(directory: Path, num_examples: int, name: DtypeName) -> FeatureStore:
    """Make a store of random features."""
    store, dtype = FeatureStore(directory, {"checkpoints": ["noise"], "dtype": name}, num_examples), feature_dtype(name)
    generator = torch.Generator().manual_seed(0)
    for shard in range(store.num_shards):
        n = len(store.shard(shard))
        outputs = torch.randn(n, generator=generator)
        p = outputs.sigmoid()
        features = torch.randn(n, K, generator=generator).to(dtype.floating)
        store.write(0, shard, Features(features, outputs, 1 - p, p * (1 - p)))
    return store


def make_scorer(store: FeatureStore) -> PrimalScorer:
    """The default scorer."""
    return PrimalScorer(store, "gauss_newton", 1.0, "per_checkpoint", 0.0)


def read_files(store: FeatureStore) -> None:
    """Read every byte of the shards into one buffer, without checks."""
    buffer = bytearray(16 * MIB)
    for path in sorted(store.directory.glob("checkpoint-*/shard-*")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def scoring(run: Run) -> list[Row]:
    """Throughput of scoring as a fraction of that of the bare product. 1 means no overhead.

    On a GPU, the data of the bare product are there already, but scoring reads files and copies them. So there are as
    many targets as in one pass over a large store.
    """
    num_targets, num_examples = (8192, 200_000) if run.device.type == "cuda" else (TARGETS, 20_000)
    with tempfile.TemporaryDirectory(dir=run.out) as directory:
        store = make_store(Path(directory) / "float32", num_examples, "float32")
        scorer = make_scorer(store)
        directions = [torch.randn(num_targets, K, device=run.device)]
        whole = torch.cat([store.read(0, shard).features for shard in range(store.num_shards)])
        features = whole.to(run.device)

        def one_product() -> Tensor:
            return directions[0] @ features.T

        def block_products() -> None:
            for block in features.split(store.shard_size):
                directions[0] @ block.T

        def score() -> object:
            return scorer.score(directions)

        def first_score() -> object:
            store._verified.clear()  # as in a new process
            return score()

        actions: dict[str, Action] = {
            "products in blocks": block_products,
            "score, later passes": score,
            "score, first pass (checksums)": first_score,
            "score, top_k=10": lambda: scorer.score(directions, top_k=10),
        }
        integers: tuple[DtypeName, ...] = ("int8", "int4")
        for name in integers:
            rounded = make_scorer(make_store(Path(directory) / name, num_examples, name))
            size = sum(tensor[:1].nbytes for tensor in rounded.store.read_stored(0, 0).tensors.values())
            actions[f"score, {name} ({size} bytes an example)"] = partial(rounded.score, directions)
        measured = ratios(one_product, actions, run.repetitions)
    shares = {name: [1 / ratio for ratio in found] for name, found in measured.items()}
    return rows("scoring", shares, f"of the throughput of one bare product ({num_targets} x {num_examples} x {K})")


def topk(run: Run, num_examples: int = 1_000_000) -> list[Row]:
    """Time and peak memory of finding the best ten of a million stored float16 examples, for 256 targets.

    Raises:
        OSError: if the disk has not enough free space for the store.
    """
    needed = 2.2 * num_examples * K
    if shutil.disk_usage(run.out).free < needed:
        raise OSError(f"the topk part needs {needed / 1e9:.1f} GB free at {run.out}; give another --out")
    with tempfile.TemporaryDirectory(dir=run.out) as directory:
        store = make_store(Path(directory), num_examples, "float16")
        scorer = make_scorer(store)
        directions = [torch.randn(TARGETS, K)]
        block = torch.randn(store.shard_size, K)
        product, reading, first, later = [], [], [], []
        reset_peak()
        with sampled() as peaks:
            for _ in range(run.repetitions):
                reading.append(seconds(lambda: read_files(store)))
                product.append(seconds(lambda: [directions[0] @ block.T for _ in range(store.num_shards)]))
                store._verified.clear()
                first.append(seconds(lambda: scorer.score(directions, top_k=10)))
                later.append(seconds(lambda: scorer.score(directions, top_k=10)))
        whole = status("VmHWM")

    def row(name: str, above: list[float], below: list[float], unit: str) -> Row:
        found = [a / b for a, b in zip(above, below, strict=True)]
        return Row("topk", name, statistics.median(found), unit, min(found), max(found), len(found))

    product_unit, reading_unit = "of the time of the bare products", "of the time of reading the files"
    return [
        row("first pass (checksums)", first, product, product_unit),
        row("later passes", later, product, product_unit),
        row("first pass (checksums)", first, reading, reading_unit),
        row("later passes", later, reading, reading_unit),
        Row("topk", "peak anonymous memory", peaks["RssAnon"] / MIB, "MiB, the interpreter and torch included"),
        Row("topk", "peak file-backed memory", peaks["RssFile"] / MIB, "MiB, shared libraries included"),
        Row("topk", "peak resident memory", whole / MIB, "MiB (VmHWM)"),
    ]
