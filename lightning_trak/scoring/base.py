"""Base of all scorers: they read training features shard by shard, and keep all scores or the best few."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lightning_trak.features.rows import Features, StoredFeatures
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.transfer import Upload, ahead
from lightning_trak.scoring.collecting import collect
from lightning_trak.scoring.groups import Sums
from lightning_trak.scoring.topk import Scores


class Scorer(ABC):
    """score(x)_i = sum_m d_m(x) . phi_m(i) w_m(i), over checkpoints m.

    A subclass gives the direction d_m of a target and the weight w_m of a training example, and says in its first lines
    what a positive score means. It may change the sums by overriding :meth:`finish`.

    Args:
        store: complete features of the training set.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store
        self._device = torch.device("cpu")

    def fit(self, device: torch.device, ranks: Ranks = Ranks()) -> None:
        """Get ready to score.

        Args:
            device: where scores will be computed.
            ranks: the processes that share the work; all must call this.

        Raises:
            RuntimeError: if the store is incomplete.
        """
        self.store.require_complete()
        self._device = with_float64(device)

    # What a subclass gives, or may change.

    @abstractmethod
    def directions(self, checkpoint: int, targets: Features) -> Tensor:
        """d_m(x) of each target: shape ``(num_targets, k)``, in at least float32, on the device of :meth:`fit`."""

    @abstractmethod
    def weights(self, checkpoint: int, rows: Features) -> Tensor | None:
        """w_m(i) of some training examples of a shard: shape ``(n,)``, or None for 1.

        The features of the rows are on the device of :meth:`fit` and in the precision of the directions.
        """

    def finish(self, sums: Tensor, loss_gradients: Callable[[], Tensor]) -> Tensor:
        """Turn sums over checkpoints into scores; by default they are the scores.

        Args:
            sums: of some training examples, shape ``(..., n)``. Scores may take their place in memory.
            loss_gradients: gives the mean of their Q over checkpoints, shape ``(n,)``.

        Returns:
            The scores, of the same shape.
        """
        return sums

    @property
    def linear(self) -> bool:
        """Whether the scores of a sum of directions are the sum of their scores."""
        return True

    @property
    def remade_bytes(self) -> int:
        """Bytes of each matrix that is made again for every block of targets; 0 if none is."""
        return 0

    @property
    def additive(self) -> bool:
        """Whether the score of a training example is the sum of those of the parts of its gradient."""
        return True

    # Scores.

    def score(
        self,
        directions: Sequence[Tensor],
        top_k: int | None = None,
        largest: bool | None = None,
        ranks: Ranks = Ranks(),
        columns: Sums | None = None,
    ) -> Scores:
        """Scores against the whole training set.

        Args:
            directions: of the targets, ``(num_targets, k)`` for each checkpoint.
            top_k: keep only this many training examples for each target, without ever holding the rest.
            largest: whether ``top_k`` keeps the highest scores or the lowest; None: both.
            ranks: the processes that share the shards; all must call this with the same targets.
            columns: how scores of training examples are added up; None: each has a column. With it, ``top_k`` keeps
                the best sums.

        Returns:
            On every rank a CPU Tensor ``(num_targets, num_train)`` or ``(num_targets, columns.count)``, or a
            :class:`~lightning_trak.scoring.BothEnds`, or of one end a :class:`~lightning_trak.scoring.TopK`.
        """
        shards = self._shards(columns)
        mine = [shards[number] for number in ranks.share(len(shards))]
        with full_precision(self._device):
            blocks = self.blocks(directions, mine)
            left_out = None if top_k is None else self.left_out(columns)
            return collect(blocks, directions[0], self.store.num_examples, top_k, largest, ranks, columns, left_out)

    def score_others(
        self,
        directions: Sequence[Tensor],
        others: Iterable[tuple[range, Sequence[Features]]],
        count: int,
        top_k: int | None = None,
        largest: bool | None = None,
        ranks: Ranks = Ranks(),
        columns: Sums | None = None,
    ) -> Scores:
        """Scores against examples that are not in the store, as if they were added to the training set.

        What the store's examples decide, such as the curvature, stays as it is. So an example that is in the store has
        the score that :meth:`score` gives it.

        Args:
            directions: as for :meth:`score`.
            others: positions of some examples and their features at each checkpoint, the same on every rank.
            count: the number of examples.
            top_k: as for :meth:`score`.
            largest: as for :meth:`score`.
            ranks: the processes that share the products; all must call this.
            columns: as for :meth:`score`, of the others.

        Returns:
            As :meth:`score`, for the others in the place of the training set.
        """
        with full_precision(self._device):
            prepared = self.prepare_others(directions, ranks)
        blocks = self._blocks_of_others(prepared, others, ranks)
        return collect(blocks, directions[0], count, top_k, largest, ranks, columns)

    def self_scores(self, ranks: Ranks = Ranks()) -> Tensor:
        """The score of each training example at itself.

        It is the diagonal of the scores whose targets are the training set; that matrix is never formed.

        Args:
            ranks: the processes that share the shards; all must call this.

        Returns:
            On every rank a CPU Tensor ``(num_train,)``.

        Raises:
            ValueError: if a score is not finite.
        """
        shards, scores = ranks.share(self.store.num_shards), torch.zeros(self.store.num_examples, dtype=self._dtype)
        with full_precision(self._device):
            sums = torch.zeros(len(scores), dtype=scores.dtype, device=self._device)
            for checkpoint in range(self.store.num_checkpoints):  # one by one, since each may need a large matrix
                for shard, products in zip(shards, self.own_products(checkpoint, shards, ranks), strict=True):
                    examples = self.store.shard(shard)
                    sums[examples.start : examples.stop] += products
            for shard in shards:
                examples = self.store.shard(shard)
                found = self.finish(sums[examples.start : examples.stop], self._loss_gradients_of(shard))
                self._require_finite(found, examples)
                scores[examples.start : examples.stop] = found.cpu()
        return self._without_skipped(ranks.sum(scores))

    def blocks(self, directions: Sequence[Tensor], shards: Sequence[int]) -> Iterator[tuple[range, Tensor]]:
        """Scores of all targets, a shard of training examples at a time.

        Shards are read, and copied to the device, while others are multiplied; nothing waits for the device.

        Args:
            directions: of the targets, ``(num_targets, k)`` for each checkpoint.
            shards: which shards.

        Yields:
            The training examples and their scores ``(num_targets, len(examples))``.

        Raises:
            ValueError: at the end, if a score was not finite.
        """
        rows, sums = self._rows(shards, range(len(directions)), directions[0].device), []
        for shard in shards:
            scores = self.block(directions, shard, rows)
            if self.skipped is not None:
                scores.masked_fill_(self._skipped_in(shard).to(scores.device), 0)
            sums.append(scores.sum())
            yield self.store.shard(shard), scores
        # The sum of a shard is not finite if any of its scores is not.
        suspects = torch.stack(sums).isfinite().logical_not().nonzero().flatten().tolist() if sums else []
        for shard in (shards[number] for number in suspects):
            again = self._rows([shard], range(len(directions)), directions[0].device)
            self._require_finite(self.block(directions, shard, again), self.store.shard(shard))

    def block(self, directions: Sequence[Tensor], shard: int, rows: Iterator[StoredFeatures]) -> Tensor:
        """Scores of all targets against the training examples of a shard.

        Args:
            directions: of the targets, ``(num_targets, k)`` for each checkpoint.
            shard: which shard.
            rows: yields its rows at each checkpoint, on the directions' device, and then those of other shards.

        Returns:
            Shape ``(num_targets, len(examples))``.
        """
        total: Tensor | None = None
        for checkpoint, direction in enumerate(directions):
            products = [self._product(checkpoint, direction, part) for part in next(rows).blocks()]
            product = products[0] if len(products) == 1 else torch.cat(products, 1)
            total = product if total is None else total.add_(product)
        assert total is not None
        return self.finish(total, self._loss_gradients_of(shard))

    def own_products(self, checkpoint: int, shards: Sequence[int], ranks: Ranks) -> Iterator[Tensor]:
        """d_m(i) . phi_m(i) w_m(i) of the training examples of some shards, before :meth:`finish`.

        Args:
            checkpoint: m.
            shards: which shards.
            ranks: the processes that share the shards; all must call this.

        Yields:
            Shape ``(n,)``, for one shard after the other.
        """
        for stored in self._rows(shards, [checkpoint], self._device):
            yield torch.cat([self._own_product(checkpoint, part) for part in stored.blocks()])

    # Parts of these.

    def prepare_others(self, directions: Sequence[Tensor], ranks: Ranks) -> Sequence[Any]:
        """What :meth:`products_with_others` needs of the targets, for each checkpoint. Default: their directions."""
        return directions

    def products_with_others(self, checkpoint: int, prepared: Any, features: Tensor) -> Tensor:
        """d_m(x) . phi of features that need not be in the store, before :meth:`weights` and :meth:`finish`.

        Args:
            checkpoint: m.
            prepared: of the targets, from :meth:`prepare_others`.
            features: phi of some examples, or of parts of them, shape ``(n, k)``.

        Returns:
            Shape ``(num_targets, n)``.
        """
        return prepared @ self._working(features).to(prepared).T  # type: ignore[no-any-return]

    def products_with_itself(self, checkpoint: int, rows: Features) -> Tensor:
        """d_m(i) . phi_m(i) of some training examples, before :meth:`weights` and :meth:`finish`: shape ``(n,)``.

        The features are on the device of :meth:`fit`, in at least float32.
        """
        return (self.directions(checkpoint, rows) * rows.features).sum(1)

    def paired(self, checkpoint: int, first: Tensor, second: Tensor) -> Tensor:
        """Inner products of two sets of features, row by row: both ``(n, k)``, the result float64 ``(n,)``."""
        return (first.to(second) * second).sum(1, dtype=torch.float64)

    def example_weights(self, checkpoint: int, rows: Features) -> Tensor:
        """The :meth:`weights` of any training examples, shape ``(n,)``, with ones in the place of None."""
        weights = self.weights(checkpoint, rows._replace(features=self._working(rows.features)))
        return torch.ones_like(rows.outputs) if weights is None else weights

    @cached_property
    def skipped(self) -> Tensor | None:
        """The training examples that featurizing has left out, bool ``(num_train,)``; None if there are none."""
        positions = self.store.skipped
        if not positions:
            return None
        skipped = torch.zeros(self.store.num_examples, dtype=torch.bool)
        skipped[positions] = True
        return skipped

    def left_out(self, columns: Sums | None) -> Tensor | None:
        """Which columns are never among the best, since all their examples were skipped: bool; None if there are none.

        Args:
            columns: as for :meth:`score`.
        """
        if self.skipped is None or columns is None:
            return self.skipped
        valid = columns.numbers[~self.skipped & (columns.numbers >= 0)]
        return valid.bincount(minlength=columns.count) == 0

    def _rows(
        self, shards: Sequence[int], checkpoints: Sequence[int], device: torch.device
    ) -> Iterator[StoredFeatures]:
        """Rows of each shard at some checkpoints, on a device. They are copied there as they are stored."""
        upload = Upload(device)

        def read() -> Iterator[StoredFeatures]:
            for shard in shards:
                for checkpoint in checkpoints:
                    rows = self.store.read_stored(checkpoint, shard)
                    # Only pinned memory is copied while the device computes.
                    yield rows.moved(Tensor.pin_memory) if device.type == "cuda" else rows

        for rows in ahead(read()):
            yield rows.moved(lambda tensor: upload(partial(tensor.to, device, non_blocking=True)))

    def _product(self, checkpoint: int, direction: Tensor, rows: Features) -> Tensor:
        rows = rows._replace(features=rows.features.to(direction.dtype))
        product = direction @ rows.features.T
        weights = self.weights(checkpoint, rows)
        return product if weights is None else product.mul_(weights.to(direction))

    def _own_product(self, checkpoint: int, rows: Features) -> Tensor:
        rows = rows._replace(features=self._working(rows.features))
        products = self.products_with_itself(checkpoint, rows)
        return products * self.example_weights(checkpoint, rows).to(products)

    def _blocks_of_others(
        self, prepared: Sequence[Any], others: Iterable[tuple[range, Sequence[Features]]], ranks: Ranks
    ) -> Iterator[tuple[range, Tensor]]:
        """This rank's part of the scores of each block."""
        for examples, rows in others:
            start, stop = (len(examples) * (ranks.rank + end) // ranks.world_size for end in (0, 1))
            if start == stop:
                continue
            parts = [Features(*(column[start:stop] for column in part)) for part in rows]
            with full_precision(self._device):
                products = []
                for m, (targets, part) in enumerate(zip(prepared, parts, strict=True)):
                    product = self.products_with_others(m, targets, part.features)
                    products.append(product * self.example_weights(m, part).to(product))
                scores = self.finish(torch.stack(products).sum(0), lambda: _mean_loss_gradients(parts))  # noqa: B023
            self._require_finite(scores, examples[start:stop])
            yield examples[start:stop], scores

    def _shards(self, columns: Sums | None) -> Sequence[int]:
        """The shards whose scores count."""
        if columns is None:
            return range(self.store.num_shards)
        spans = [(shard, self.store.shard(shard)) for shard in range(self.store.num_shards)]
        return [shard for shard, span in spans if (columns.numbers[span.start : span.stop] >= 0).any()]

    def _skipped_in(self, shard: int) -> Tensor:
        assert self.skipped is not None
        examples = self.store.shard(shard)
        return self.skipped[examples.start : examples.stop]

    def _without_skipped(self, scores: Tensor) -> Tensor:
        """The scores ``(num_train,)``, with zeros for skipped examples."""
        return scores if self.skipped is None else scores.masked_fill(self.skipped, 0)

    def _require_finite(self, scores: Tensor, examples: range) -> None:
        if not scores.isfinite().all():
            raise ValueError(
                f"scores of training examples {examples} are not finite: the features overflow"
                f" {scores.dtype}; featurize with dtype=torch.float64"
            )

    def _loss_gradients_of(self, shard: int) -> Callable[[], Tensor]:
        """Reads the mean of Q over checkpoints of a shard's examples."""
        checkpoints = range(self.store.num_checkpoints)
        return lambda: _mean_loss_gradients([self.store.read_stored(number, shard) for number in checkpoints])

    @property
    def _dtype(self) -> torch.dtype:
        """Of scores: that of the features, at least float32."""
        return torch.promote_types(self.store.read_stored(0, 0).dtype.floating, torch.float32)

    def _working(self, tensor: Tensor) -> Tensor:
        """On the device, in at least float32."""
        return tensor.to(self._device, torch.promote_types(tensor.dtype, torch.float32))


def _mean_loss_gradients(rows: Sequence[Features | StoredFeatures]) -> Tensor:
    """The mean of Q over checkpoints."""
    return torch.stack([part.loss_gradients for part in rows]).mean(0)


def with_float64(device: torch.device) -> torch.device:
    """The device, or the CPU in the place of MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def full_precision(device: torch.device) -> torch.autocast:
    """A context without autocast: Lightning's mixed precision, or the user's own, would round the products."""
    return torch.autocast(device.type, enabled=False)
