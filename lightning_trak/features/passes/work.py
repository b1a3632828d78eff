"""What a call of ``featurize`` has to do, and how far the store is."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader

from lightning_trak.features.store import FeatureStore
from lightning_trak.running.data.content import prefix_digests, warn_of_random_items
from lightning_trak.running.data.loading import batch_size_of, num_examples
from lightning_trak.running.parts import Part, share


def missing_shards(store: FeatureStore, extras: Sequence[str] = (), part: Part | None = None) -> list[list[int]]:
    """The numbers of the shards that are missing at each checkpoint. One that is listed twice is made once.

    Args:
        store: the store.
        extras: see :meth:`FeatureStore.missing`.
        part: only the shards of this part.
    """
    mine = set(share([(c, shard) for c in store.first for shard in range(store.num_shards)], part))
    found: list[list[int]] = [[] for _ in range(store.num_checkpoints)]
    for checkpoint in store.first:
        found[checkpoint] = [shard for shard in store.missing(checkpoint, extras) if (checkpoint, shard) in mine]
    return found


def progress(store: FeatureStore) -> str:
    """How many shards there are, in words."""
    total = len(store.first) * store.num_shards
    return f"the store has {total - sum(map(len, missing_shards(store)))} of {total} shards"


def default_shard_size(num_examples: int, loader: DataLoader[Any]) -> int:
    """About 1024 examples in whole batches. It is less for small data, so that ranks can share the work.

    It is not much less, since some examples of each shard are audited, which takes longer than to featurize them.
    """
    batch = batch_size_of(loader)
    wanted = min(1024, -(-num_examples // 4))
    return batch * max(1, round(wanted / batch))


class Samples:
    """Digests of some of the first examples, given how many. Each is made once.

    Args:
        loader: the training data.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._total = num_examples(loader)
        self._found: dict[int, list[str] | None] = {}

    def __call__(self, count: int) -> list[str] | None:
        """Digests of some of the first ``count`` examples; None, with a warning, if they are not the same twice."""
        if count not in self._found:
            self._found[count] = prefix_digests(self._loader, count)
            if self._found[count] is None and count == self._total:
                warn_of_random_items("the training data")
        return self._found[count]
