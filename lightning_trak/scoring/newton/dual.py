"""TRAK's scores from an n x n system, which has a row for each training example; ``kernel.py`` has the formula."""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_trak.features.rows import StoredFeatures
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.base import full_precision
from lightning_trak.scoring.groups import Sums
from lightning_trak.scoring.newton.gram import require_convex
from lightning_trak.scoring.newton.kernel import DampedKernel, kernel_matrix, products_with
from lightning_trak.scoring.newton.primal import PrimalScorer
from lightning_trak.scoring.newton.trak import TRAKScorer
from lightning_trak.scoring.newton.undamped import Undamped
from lightning_trak.scoring.topk import Scores

_LONG = 10**12  # operations for a Gram matrix: some ten seconds on one core


def smaller_scorer(store: FeatureStore, curved: FeatureStore | None = None) -> type[TRAKScorer]:
    """The scorer whose system is the smaller one: the dual if K is made of fewer rows than there are features.

    Args:
        store: complete features of the training set.
        curved: as for :class:`~lightning_trak.scoring.TRAKScorer`.

    Raises:
        RuntimeError: if the store is incomplete.
    """
    store.require_complete()
    n, k = store.num_examples * (1 if curved is None else 2), store.read_stored(0, 0).k
    if n >= k:
        if n * k**2 > _LONG:
            rank_zero_info(
                f"TRAK: solves {k} x {k} (features), with a Gram matrix of {store.num_examples} examples at each"
                " checkpoint, which is made once and kept in the store; a projection to fewer features takes less time"
            )
        return PrimalScorer
    rows = "examples" if curved is None else "two rows for each example"
    rank_zero_info(f"TRAK: solves {n} x {n} ({rows}) instead of {k} x {k} (features), since n is smaller")
    return DualScorer


class DualScorer(TRAKScorer):
    """Factors the kernel of the training examples, and solves for the scores of each target.

    A positive score says that training on i raises the output at x. The features are read once for all targets, to
    multiply them. The arguments are those of :class:`~lightning_trak.scoring.TRAKScorer`; the damping must be more than
    0.
    """

    @property
    def num_rows(self) -> int:
        """n, the number of training examples, once for each source of K."""
        return sum(source.num_examples for source, _ in self.sources)

    def precondition(self, checkpoint: int, features: Tensor) -> Tensor:
        """phi(x) of each target, in at least float32: :meth:`score` solves."""
        return self._working(features)

    def score(
        self,
        directions: Sequence[Tensor],
        top_k: int | None = None,
        largest: bool | None = None,
        ranks: Ranks = Ranks(),
        columns: Sums | None = None,
    ) -> Scores:
        """See :meth:`Scorer.score`."""
        with full_precision(self._device):
            scores = self._solved(directions, ranks)
            solved = [tau.to(features) for tau, features in zip(scores, directions, strict=True)]
        return super().score(solved, top_k, largest, ranks, columns)

    def block(
        self,
        directions: Sequence[Tensor],
        shard: int,
        rows: Iterator[StoredFeatures],
    ) -> Tensor:
        """See :meth:`Scorer.block`. The solutions are scores already, and no features are read."""
        examples, total = self.store.shard(shard), directions[0].new_zeros(())
        for checkpoint, direction in enumerate(directions):
            stored = self.store.read_stored(checkpoint, shard)
            total = total + self._weighted(direction[:, examples.start : examples.stop], checkpoint, stored)
        return self.finish(total, self._loss_gradients_of(shard))

    def _own(self, checkpoint: int, shards: Sequence[int], ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`TRAKScorer._own`."""
        kernel, system = self._kernel(checkpoint, ranks), self._damped(checkpoint)  # even if this rank has no shard
        for examples in map(self.store.shard, shards):
            rows = kernel[examples.start : examples.stop]
            yield system.own(rows, examples), rows[:, examples.start : examples.stop].diagonal()

    def prepare_others(self, directions: Sequence[Tensor], ranks: Ranks) -> Sequence[Any]:
        """See :meth:`Scorer.prepare_others`. The scores of the stored examples are needed, too."""
        return list(zip(directions, self._solved(directions, ranks), strict=True))

    def products_with_others(self, checkpoint: int, prepared: Any, features: Tensor) -> Tensor:
        """See :meth:`Scorer.products_with_others`. The stored features of the checkpoint are read."""
        targets, solved = prepared
        features = self._working(features)
        own = self._products_between(checkpoint, targets, features)
        products = self._products(checkpoint, features, Ranks())
        return self._damped(checkpoint).outside(solved, own, products).to(targets)

    def _solved(self, directions: Sequence[Tensor], ranks: Ranks) -> Iterator[Tensor]:
        """The scores of all rows of K at each checkpoint, before they are multiplied by Q, in float64.

        Those of the store come first.
        """
        for checkpoint, features in enumerate(directions):
            products = self._products(checkpoint, features, ranks)
            yield self._damped(checkpoint).solve(products)

    def _damped(self, checkpoint: int) -> DampedKernel:
        return cast(DampedKernel, self._system(checkpoint)[0])

    def _undamped(self, checkpoint: int, ranks: Ranks) -> Undamped[DampedKernel]:
        kernel, curvatures = self._kernel(checkpoint, ranks), self._curvatures(checkpoint)
        weights, about = curvatures * kernel.diagonal(), self._about(checkpoint)

        def factor(damping: float) -> DampedKernel:
            return DampedKernel(kernel, curvatures, damping, self.num_features, *about, self._device)

        def residual_step(system: DampedKernel) -> tuple[float, float]:
            residuals = self._residuals(checkpoint)
            return system.squared_step(residuals, kernel), float(residuals.square() @ kernel.diagonal())

        return Undamped(weights.sum(), weights.square().sum(), factor, residual_step)

    def _kernel(self, checkpoint: int, ranks: Ranks) -> Tensor:
        """Inner products of the features of all rows of K: float64, shape ``(n, n)``, on the CPU."""
        stores = [source for source, _ in self.sources]
        *others, keeper = stores  # the store that keeps it adds its own digest to the key
        about = "".join(f":{other.digest(checkpoint)}" for other in others)

        def make() -> dict[str, Tensor]:
            return {"kernel": kernel_matrix(stores, checkpoint, self._device, ranks).cpu()}

        return self._kept(keeper, checkpoint, "kernel", about, ranks, make)["kernel"]

    def _products(self, checkpoint: int, targets: Tensor, ranks: Ranks) -> Tensor:
        """Inner products of the features of targets and of all rows of K: float64, ``(num_targets, n)``."""
        return torch.cat([products_with(source, checkpoint, targets, ranks) for source, _ in self.sources], dim=1)

    def _products_between(self, checkpoint: int, targets: Tensor, others: Tensor) -> Tensor:
        """Inner products of targets with other examples, in float64, shape ``(num_targets, n)``."""
        return targets.double() @ others.double().T

    def _curvatures(self, checkpoint: int) -> Tensor:
        """R of all rows of K, or ones, times the share of their source; 0 for examples that the model has not seen.

        Returns:
            float64, shape ``(n,)``.
        """
        found = []
        for source, share in self.sources:
            shards = (source.read_stored(checkpoint, shard).curvatures for shard in range(source.num_shards))
            curvatures = torch.cat(list(shards)).double()
            if self.curvature == "identity":
                curvatures = torch.ones_like(curvatures)
            require_convex(curvatures, 'curvature="identity"')
            found.append(share * self._where_seen(checkpoint, curvatures))
        return torch.cat(found)

    def _residuals(self, checkpoint: int) -> Tensor:
        """Q of all training examples; 0 for those that the model has not seen. float64, shape ``(n,)``."""
        shards = (self.store.read_stored(checkpoint, shard).loss_gradients for shard in range(self.store.num_shards))
        return self._where_seen(checkpoint, torch.cat(list(shards)).double())

    def _where_seen(self, checkpoint: int, values: Tensor) -> Tensor:
        subset = self.subsets[checkpoint]
        return values if subset is None else values * subset.mask
