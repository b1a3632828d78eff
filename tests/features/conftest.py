"""A store that is complete."""

import pytest

from lightning_trak.features.store import FeatureStore
from tests.features.small_store import IDENTITY, rows


@pytest.fixture
def store(tmp_path):
    """Two checkpoints, ten examples in three shards."""
    store = FeatureStore(tmp_path / "store", IDENTITY, num_examples=10, shard_size=4)
    for checkpoint in range(2):
        for shard in range(3):
            store.write(checkpoint, shard, rows(len(store.shard(shard)), 10 * checkpoint + shard))
    return store
