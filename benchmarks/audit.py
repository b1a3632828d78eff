"""The cost of auditing a shard, as a fraction of featurizing it."""

import importlib.util

import torch

from benchmarks.models import WORKLOADS
from benchmarks.ours import K, extractor_of, settings
from benchmarks.timing import Row, Run, ratios, rows
from lightning_trak.gradients.batch import ExampleBatch

SHARD, AUDITED = 1024, 2
SIZES = {"resnet9": 32, "gpt2, 6 layers": 8}
SETTINGS = ("hooks + SparseProjection", "hooks + KroneckerProjection")


def audit(run: Run) -> list[Row]:
    """Featurize one batch with the audited examples of a shard, and without. A shard has this difference once."""
    found = []
    for name, size in SIZES.items():
        if name != "resnet9" and not importlib.util.find_spec("transformers"):
            found.append(Row("audit", name, None, "of a shard", repetitions=0, note="transformers is not installed"))
            continue
        work = WORKLOADS[name](size).to(run.device)
        batch, positions = ExampleBatch(work.batch, size), torch.arange(size)
        audited = {number: batch.take([number, number]).fresh() for number in range(AUDITED)}
        for key in SETTINGS:
            extractor = extractor_of(work, settings(K)[key])
            measured = ratios(
                lambda: extractor(work.batch, positions),  # noqa: B023
                {key: lambda: extractor(work.batch, positions, audited)},  # noqa: B023
                run.repetitions,
            )
            shares = [(ratio - 1) * size / SHARD for ratio in measured[key]]
            found += rows("audit", {f"{name}: {key}": shares}, f"of featurizing {SHARD} examples")
    return found
