"""Where features go: shards are written by threads of their own."""

import threading

import pytest
import torch

from lightning_trak.features.finiteness import NotFiniteError
from lightning_trak.features.rows import Features
from lightning_trak.features.sinks import ShardWriter
from lightning_trak.features.store import FeatureStore

IDENTITY = {
    "seed": 0,
    "dtype": "float32",
    "projection": {"class": "SparseProjection", "dim": 3},
    "output": {"class": "ClassificationMargin"},
    "parameters": [["weight", [3]]],
    "checkpoints": ["aa"],
}


def add(writer, number, features):
    shard = writer.store.shard(number)
    positions = torch.arange(shard.start, shard.stop)
    return writer.add(0, number, positions, Features(features, *torch.zeros(3, len(shard))), "hooks")


def test_a_thread_ends_with_its_shard(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path / "store", IDENTITY, num_examples=8, shard_size=4)
    threads = []
    write = FeatureStore.write

    def noted(self, *args):
        threads.append(threading.current_thread())
        write(self, *args)

    monkeypatch.setattr(FeatureStore, "write", noted)
    given = torch.arange(24.0).view(8, 3)
    with ShardWriter(store, ["checkpoint 1"]) as writer:
        assert add(writer, 0, given[:4])
        assert add(writer, 1, given[4:])
        threads[0].join(10)
        assert not threads[0].is_alive()
    assert len(set(threads)) == 2
    assert threading.main_thread() not in threads
    assert torch.equal(torch.cat([store.read(0, number).features for number in range(2)]), given)


def test_an_error_in_a_shard_is_raised_at_the_end(tmp_path):
    store = FeatureStore(tmp_path / "store", IDENTITY, num_examples=4, shard_size=4)
    writer = ShardWriter(store, ["checkpoint 1"])
    with pytest.raises(NotFiniteError), writer:
        add(writer, 0, torch.full((4, 3), torch.nan))
    assert store.missing(0) == [0]
