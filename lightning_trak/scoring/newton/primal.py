"""TRAK's scores from a k x k system, which has a row for each feature."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor

from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.newton.gram import DampedGram, gram_matrix, shard_blocks
from lightning_trak.scoring.newton.lag import residual_sums
from lightning_trak.scoring.newton.trak import TRAKScorer
from lightning_trak.scoring.newton.undamped import Undamped


class PrimalScorer(TRAKScorer):
    """Factors K_m + lambda_m I, and solves for each target.

    A positive score says that training on i raises the output at x. The arguments are those of
    :class:`~lightning_trak.scoring.TRAKScorer`.
    """

    @property
    def num_rows(self) -> int:
        """k, the number of features."""
        return self.num_features

    def precondition(self, checkpoint: int, features: Tensor) -> Tensor:
        """(K_m + lambda_m I)^-1 phi(x) of each target: shape ``(num_targets, k)``, in at least float32."""
        return self._system(checkpoint)[0].solve(self._working(features))

    def _own(self, checkpoint: int, shards: Sequence[int], ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`TRAKScorer._own`. It takes half the time of :meth:`precondition`."""
        system = cast(DampedGram, self._system(checkpoint)[0])
        for stored in self._rows(shards, [checkpoint], self._device):
            blocks = (self._working(rows.features).double() for rows in stored.blocks())
            parts = [(system.own(features), features.square().sum(1)) for features in blocks]
            products, squares = zip(*parts, strict=True)
            yield torch.cat(products), torch.cat(squares)

    def _undamped(self, checkpoint: int, ranks: Ranks) -> Undamped[DampedGram]:
        gram, squared_weights = (tensor.to(self._device) for tensor in self._gram(checkpoint, ranks))
        about = self._about(checkpoint)

        @cache  # all ranks must make it together, however many dampings each tries
        def residuals() -> tuple[Tensor, Tensor]:
            return self._pull(checkpoint, ranks)

        def residual_step(system: DampedGram) -> tuple[float, float]:
            pull, squares = residuals()
            return system.squared_step(pull.to(self._device)), float(squares)

        def factor(damping: float) -> DampedGram:
            return DampedGram(gram, damping, *about)

        return Undamped(gram.trace(), squared_weights, factor, residual_step)

    def _gram(self, checkpoint: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """See :func:`~lightning_trak.scoring.newton.gram.gram_matrix`; of several sources, each with its share."""
        gram, squared_weights = self._gram_of(self.store, checkpoint, ranks)
        for source, share in self.sources[1:]:
            more, weights = self._gram_of(source, checkpoint, ranks)
            gram = gram.lerp(more, share)
            squared_weights = squared_weights * (1 - share) ** 2 + weights * share**2
        return gram, squared_weights

    def _gram_of(self, source: FeatureStore, checkpoint: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        def make() -> dict[str, Tensor]:
            sums = gram_matrix(self._seen(source, checkpoint, ranks), self.curvature, self.num_features, self._device)
            return dict(zip(("gram", "squared_weights"), map(ranks.sum, sums), strict=True))

        kept = self._kept(source, checkpoint, f"gram-{self.curvature}", self._seen_key(checkpoint), ranks, make)
        return kept["gram"], kept["squared_weights"]

    def _pull(self, checkpoint: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """See :func:`~lightning_trak.scoring.newton.lag.residual_sums`."""

        def make() -> dict[str, Tensor]:
            sums = residual_sums(self._seen(self.store, checkpoint, ranks), self.num_features, self._device)
            return dict(zip(("pull", "squared_residuals"), map(ranks.sum, sums), strict=True))

        kept = self._kept(self.store, checkpoint, "residuals", self._seen_key(checkpoint), ranks, make)
        return kept["pull"], kept["squared_residuals"]

    def _seen_key(self, checkpoint: int) -> str:
        """What the key of a sum over the examples that a checkpoint's model has seen says of them."""
        subset = self.subsets[checkpoint]
        return "" if subset is None else f":{subset.digest}"

    def _seen(self, source: FeatureStore, checkpoint: int, ranks: Ranks) -> Iterator[Features]:
        """This rank's share of the rows of examples that the checkpoint's model has seen, in blocks of shards."""
        subset = self.subsets[checkpoint]
        blocks = shard_blocks(source.num_shards, source.shard_size)
        for shard in (shard for part in ranks.share(len(blocks)) for shard in blocks[part]):
            rows, examples = source.read_stored(checkpoint, shard), source.shard(shard)
            if subset is not None:
                rows = rows[subset.mask[examples.start : examples.stop]]
            yield from rows.moved(lambda codes: codes.to(self._device)).blocks()
