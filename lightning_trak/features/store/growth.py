"""The training data of a store, and how they have grown.

A store begins with some examples. Later, examples can be appended to the dataset. The store's ``data`` is a list of
parts, one for each size that the dataset has had, with digests of some of the examples that it then had. Each part
is cut into shards of its own, and their numbers go on. So the ranges of old shards never change, and no old file is
written again.

A part counts once it has a shard. Until then, readers see the store without it, and a run with other data may take its
place.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from lightning_trak.running.data.content import MANY

DataPart = dict[str, Any]  # num_examples, and digests of some of them: sample
Sample = Callable[[int], list[str] | None]


class ShardRanges:
    """Which examples each shard holds.

    Args:
        sizes: the sizes that the dataset has had, in order.
        shard_size: examples in a shard.

    Attributes:
        count: the number of shards.
    """

    def __init__(self, sizes: Sequence[int], shard_size: int) -> None:
        self._shard_size = shard_size
        self._starts = [0, *sizes[:-1]]
        self._stops = list(sizes)
        counts = [-(-(stop - start) // shard_size) for start, stop in zip(self._starts, self._stops, strict=True)]
        self._firsts = [0, *accumulate(counts)]
        self.count = self._firsts[-1]

    def part(self, shard: int) -> int:
        """The number of the part that a shard belongs to."""
        return bisect_right(self._firsts, shard) - 1

    def __getitem__(self, shard: int) -> range:
        part = self.part(shard)
        start = self._starts[part] + (shard - self._firsts[part]) * self._shard_size
        return range(start, min(start + self._shard_size, self._stops[part]))


def settled_parts(directory: Path, manifest: dict[str, Any]) -> list[DataPart]:
    """The parts of a store's data that count: up to the last one that has a shard.

    Args:
        directory: the store.
        manifest: its manifest.
    """
    parts: list[DataPart] = manifest["data"]
    if len(parts) == 1:
        return parts if any(directory.glob("checkpoint-*/shard-*")) else []
    ranges = ShardRanges([part["num_examples"] for part in parts], manifest["shard_size"])
    names = (path.name for path in directory.glob("checkpoint-*/shard-*"))
    numbers = (int(found[1]) for name in names if (found := re.fullmatch(r"shard-(\d+)\.safetensors", name)))
    last = max((number for number in numbers if number < ranges.count), default=None)
    return [] if last is None else parts[: ranges.part(last) + 1]


def last_part(directory: Path, manifest: dict[str, Any]) -> DataPart:
    """The data that a store has, with all that were added to them.

    Args:
        directory: the store.
        manifest: its manifest.
    """
    parts: list[DataPart] = settled_parts(directory, manifest) or manifest["data"]
    return parts[-1]


def parts_with(settled: list[DataPart], num_examples: int | None, sample: Sample | None) -> list[DataPart] | None:
    """The parts of a store that a run goes on with.

    Args:
        settled: the parts that count.
        num_examples: the size of the run's dataset; None: that of the store.
        sample: digests of some of the first examples of the dataset, given how many; None: no digest is compared.

    Returns:
        The settled parts, with one more if the dataset has grown; None if its first examples are others, or cannot be
        compared.
    """
    size = settled[-1]["num_examples"]
    if num_examples is None or (num_examples == size and sample is None):
        return settled
    if num_examples < size or sample is None:
        return None
    before = settled[-1]["sample"]
    if sample(size) != before or (before is None and num_examples > size):
        return None
    if num_examples == size:
        return settled
    return [*settled, {"num_examples": num_examples, "sample": sample(num_examples)}]


def describe_data(theirs: list[DataPart], mine: list[DataPart]) -> tuple[str, str]:
    """Describe the data of a store and those of a run that cannot go on with it."""
    before, now = theirs[-1]["num_examples"], mine[-1]["num_examples"]
    if before == now:
        found = f"data that differ in some of {MANY} items spread over the dataset (a random split needs a seed)"
        return "other training data of this size", found
    made = f"{before} training examples"
    if now < before:
        return made, f"{now}"
    if theirs[-1]["sample"] is None:
        return f"{made} that are not the same twice", f"{now}, and nobody can tell whether the first ones are the same"
    return made, f"{now}, and some of the first {before} are others ({min(MANY, before)} were compared)"
