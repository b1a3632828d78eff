"""What all scorers share: shards of training features stream by, and leave blocks of scores or the best few."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_trak.distributed import Ranks
from lightning_trak.scorers.topk import TopK, block_top_k, merge_top_k
from lightning_trak.store import Features, FeatureStore

Scores = Tensor | TopK


class Scorer(ABC):
    """score(x)_i = sum_m d_m(x) . phi_m(i) w_m(i), over checkpoints m.

    A method says what the direction d_m of a target and the weight w_m of a training example are, and may go on from
    there by overriding :meth:`block`.

    Args:
        store: complete features of the training set.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._device = torch.device("cpu")

    def fit(self, device: torch.device, ranks: Ranks = Ranks()) -> None:  # noqa: ARG002, B008
        """Get ready to score.

        Args:
            device: where scores will be computed.
            ranks: the processes that share the work; all must call this.

        Raises:
            RuntimeError: if the store is incomplete.
        """
        self.store.require_complete()
        self._device = torch.device("cpu") if device.type == "mps" else device  # which has no float64

    @abstractmethod
    def directions(self, checkpoint: int, targets: Features) -> Tensor:
        """d_m(x) of each target: shape ``(num_targets, k)``, in at least float32, on the device of :meth:`fit`."""

    @abstractmethod
    def weights(self, checkpoint: int, rows: Features) -> Tensor | None:
        """w_m(i) of each training example of a shard: shape ``(n,)``, or None for 1.

        The features of the rows are on the device of :meth:`fit` and in the precision of the directions.
        """

    def block(self, directions: Sequence[Tensor], shard: int) -> Tensor:
        """Scores of all targets against the training examples of a shard, ``(num_targets, len(examples))``."""
        total: Tensor | None = None
        for checkpoint, direction in enumerate(directions):
            rows = self.store.read(checkpoint, shard)
            rows = rows._replace(features=rows.features.to(direction))
            product = direction @ rows.features.T
            weights = self.weights(checkpoint, rows)
            if weights is not None:
                product *= weights.to(direction)
            total = product if total is None else total.add_(product)
        assert total is not None
        return total

    def blocks(self, directions: Sequence[Tensor], shards: Sequence[int]) -> Iterator[tuple[range, Tensor]]:
        """Scores of all targets, a shard of training examples at a time.

        Args:
            directions: those of the targets at each checkpoint, ``(num_targets, k)`` each.
            shards: which shards.

        Yields:
            The training examples and their scores ``(num_targets, len(examples))``.

        Raises:
            ValueError: if a score is not finite.
        """
        for shard in shards:
            scores = self.block(directions, shard)
            # A sum is a quick look: it is not finite if any score is not.
            if not (scores.sum().isfinite() or scores.isfinite().all()):
                raise ValueError(
                    f"scores of training examples {self.store.shard(shard)} are not finite: the features overflow"
                    f" {scores.dtype}; featurize with dtype=torch.float64"
                )
            yield self.store.shard(shard), scores

    def score(
        self,
        directions: Sequence[Tensor],
        top_k: int | None = None,
        largest: bool = True,
        ranks: Ranks = Ranks(),  # noqa: B008
    ) -> Scores:
        """Scores against the whole training set.

        Args:
            directions: those of the targets at each checkpoint, ``(num_targets, k)`` each.
            top_k: keep only this many training examples for each target, without ever holding the rest.
            largest: whether ``top_k`` keeps the highest scores or the lowest.
            ranks: the processes that share the shards; all must call this with the same targets.

        Returns:
            On every rank a CPU Tensor ``(num_targets, num_train)``, or a :class:`~lightning_trak.scorers.TopK`.
        """
        with full_precision(self._device):
            mine = self._collect(directions, ranks.share(self.store.num_shards), top_k, largest)
        if isinstance(mine, Tensor):
            return ranks.sum(mine)
        assert top_k is not None
        return merge_top_k(ranks.gather(mine), top_k, largest)

    def _collect(self, directions: Sequence[Tensor], shards: Sequence[int], top_k: int | None, largest: bool) -> Scores:
        targets, dtype = len(directions[0]), directions[0].dtype
        if top_k is None:
            scores = torch.zeros(targets, self.store.num_examples, dtype=dtype)
            for examples, block in self.blocks(directions, shards):
                scores[:, examples.start : examples.stop] = block.cpu()
            return scores
        best = TopK(torch.empty(targets, 0, dtype=dtype), torch.empty(targets, 0, dtype=torch.int64))
        for examples, block in self.blocks(directions, shards):
            found = block_top_k(block, examples.start, top_k, largest)
            best = merge_top_k([best, TopK(found.values.cpu(), found.indices.cpu())], top_k, largest)
        return best

    def _working(self, tensor: Tensor) -> Tensor:
        """On the device, in at least float32."""
        return tensor.to(self._device, torch.promote_types(tensor.dtype, torch.float32))


def full_precision(device: torch.device) -> torch.autocast:
    """Outside autocast, under which Lightning's mixed precision or the user's own would round products."""
    return torch.autocast(device.type, enabled=False)
