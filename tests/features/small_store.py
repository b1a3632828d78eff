"""A store of ten examples, its rows and its headers."""

import torch

from lightning_trak.features.rows import Features

IDENTITY = {
    "seed": 0,
    "dtype": "float32",
    "projection": {"class": "SparseProjection", "dim": 4},
    "output": {"class": "ClassificationMargin"},
    "parameters": [["weight", [2, 3]], ["bias", [2]]],
    "checkpoints": ["aa", "bb"],
}


def rows(count: int, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    return Features(torch.randn(count, 4, generator=generator), *torch.rand(3, count, generator=generator))


def header(store, k=4):
    """The header of shard 0 of checkpoint 1."""
    place = {"checkpoint": "bb", "name": "shard-00000", "key": store.key, "engine": ""}
    return place | {"dtype": "float32", "k": k, "skipped": []}


def contents(store):
    return {path: path.read_bytes() for path in sorted(store.directory.rglob("*")) if path.is_file()}
