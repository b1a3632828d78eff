"""Where features go: shards are written by threads of their own."""

import threading

import pytest
import torch

from lightning_trak.features.passes import sinks
from lightning_trak.features.passes.sinks import ShardWriter
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.data.ranges import Stop

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
    save = FeatureStore.save

    def noted(self, *args):
        threads.append(threading.current_thread())
        save(self, *args)

    monkeypatch.setattr(FeatureStore, "save", noted)
    given = torch.arange(24.0).view(8, 3)
    with ShardWriter(store, False, Stop()) as writer:
        assert add(writer, 0, given[:4])
        assert add(writer, 1, given[4:])
        threads[0].join(10)
        assert not threads[0].is_alive()
    assert len(set(threads)) == 2
    assert threading.main_thread() not in threads
    assert torch.equal(torch.cat([store.read(0, number).features for number in range(2)]), given)


def test_an_error_in_a_shard_is_raised_at_the_end(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("disk full")

    monkeypatch.setattr(FeatureStore, "save", full)
    store = FeatureStore(tmp_path / "store", IDENTITY, num_examples=4, shard_size=4)
    writer = ShardWriter(store, False, Stop())
    with pytest.raises(OSError, match="disk full"), writer:
        add(writer, 0, torch.zeros(4, 3))


@pytest.mark.parametrize("skips", [False, True])
def test_examples_that_are_not_finite_are_noted(tmp_path, skips, monkeypatch):
    monkeypatch.setattr(sinks, "_HOPELESS", 8)
    store, stop = FeatureStore(tmp_path / "store", IDENTITY, num_examples=12, shard_size=4), Stop()
    given = torch.ones(12, 3)
    given[[1, 3], 2] = torch.nan
    given[4:] = torch.inf
    with ShardWriter(store, skips, stop) as writer:
        for number in range(3):
            add(writer, number, given[4 * number : 4 * number + 4])
    assert not stop.requested
    assert writer.not_finite.found == {0: [1, 3, *range(4, 12)]}
    assert store.missing(0) == ([] if skips else [0, 1, 2])
    assert store.skipped == ([1, 3, *range(4, 12)] if skips else [])


@pytest.mark.parametrize("skips", [False, True])
def test_where_nothing_is_finite_the_loaders_stop(tmp_path, skips, monkeypatch):
    monkeypatch.setattr(sinks, "_HOPELESS", 8)
    store, stop = FeatureStore(tmp_path / "store", IDENTITY, num_examples=12, shard_size=4), Stop()
    requested, writer = [], ShardWriter(store, skips, stop)
    for number in range(2):
        with writer:
            add(writer, number, torch.full((4, 3), torch.nan))
        requested.append(stop.requested)
    assert requested == [False, not skips]
