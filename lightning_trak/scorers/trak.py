"""TRAK scores from stored features: one Newton step for each training example, averaged over checkpoints."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_trak.distributed import Ranks
from lightning_trak.scorers.damping import Damping, auto_damping
from lightning_trak.scorers.gram import Curvature, DampedGram, gram_matrix
from lightning_trak.scorers.topk import TopK, block_top_k, merge_top_k
from lightning_trak.store import FeatureStore

Residuals = Literal["per_checkpoint", "averaged"]
Scores = Tensor | TopK

_CACHE_FORMAT = 2  # of what is kept with a Gram matrix; that of another format is made again


class TRAKScorer:
    """tau(x)_i = 1/M sum_m phi_m(x)^T (K_m + lambda_m I)^-1 phi_m(i) Q_m(i).

    K_m = sum_j R_m(j) phi_m(j) phi_m(j)^T is the Hessian of the linearised model's loss, so tau(x)_i is what a Newton
    step says that training example i adds to the output at x (Pregibon 1981; Park et al. 2023, arXiv 2303.14186,
    section 3).

    Args:
        store: complete features of the training set.
        curvature: how K weighs examples, see :func:`~lightning_trak.scorers.gram.gram_matrix`.
        damping: lambda_m relative to the mean of K_m's diagonal; ``"auto"`` chooses it for each checkpoint, see
            :func:`~lightning_trak.scorers.damping.auto_damping`.
        residuals: ``"per_checkpoint"`` as above; ``"averaged"`` as published (arXiv 2303.14186, section 3): the average
            of phi^T K^-1 phi over checkpoints times the average of Q.
        soft_threshold: scores move towards zero by this much, and no further: the paper's optional sparsification.
            Where fewer than ``top_k`` scores are left, which zeros fill the rest is arbitrary.
    """

    def __init__(
        self,
        store: FeatureStore,
        curvature: Curvature,
        damping: Damping,
        residuals: Residuals,
        soft_threshold: float,
    ) -> None:
        self.store = store
        self.curvature: Curvature = curvature
        self.damping: Damping = damping
        self.residuals = residuals
        self.soft_threshold = soft_threshold
        self._factors: list[DampedGram] = []
        self._device = torch.device("cpu")

    def fit(self, device: torch.device, ranks: Ranks = Ranks()) -> None:  # noqa: B008
        """Make and factor the Gram matrices.

        Args:
            device: where scores will be computed.
            ranks: the processes that share the work; all must call this.

        Raises:
            RuntimeError: if the store is incomplete.
            ValueError: if a Gram matrix cannot be factored.
        """
        self.store.require_complete()
        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        if self._factors and device == self._device:
            return
        self._device, self._factors = device, []
        dampings = []
        for checkpoint in range(self.store.num_checkpoints):
            gram, squared_weights = (tensor.to(device) for tensor in self._gram(checkpoint, ranks))
            damping = auto_damping(gram, squared_weights) if self.damping == "auto" else self.damping
            dampings.append(damping)
            precision = self.store.read(checkpoint, 0).features.dtype
            self._factors.append(DampedGram(gram, damping, precision, f"checkpoint {checkpoint}"))
        if self.damping == "auto":
            rank_zero_info(f"TRAK: damping='auto' is {min(dampings):.3g} to {max(dampings):.3g} at the checkpoints")

    def _gram(self, checkpoint: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        name, key = f"gram-{self.curvature}", f"{_CACHE_FORMAT}:{self.store.digest(checkpoint)}"
        stored = self.store.read_extra(checkpoint, name, key)
        if ranks.all_true(stored is not None) and stored is not None:
            return stored["gram"], stored["squared_weights"]
        k = self.store.read(checkpoint, 0).features.shape[1]
        mine = (self.store.read(checkpoint, shard) for shard in ranks.share(self.store.num_shards))
        with _full_precision(self._device):
            gram, squared_weights = map(ranks.sum, gram_matrix(mine, self.curvature, k, self._device))
        if ranks.rank == 0:
            try:
                self.store.write_extra(checkpoint, name, {"gram": gram, "squared_weights": squared_weights}, key)
            except OSError as error:  # the store may be somebody else's, to be read only
                warnings.warn(f"the Gram matrix cannot be kept and will be made again next time: {error}", stacklevel=2)
        return gram, squared_weights

    def precondition(self, checkpoint: int, features: Tensor) -> Tensor:
        """(K_m + lambda_m I)^-1 phi(x) for each target: shape ``(num_targets, k)``, in at least float32."""
        working = torch.promote_types(features.dtype, torch.float32)
        return self._factors[checkpoint].solve(features.to(self._device, working))

    def blocks(self, directions: Sequence[Tensor], shards: Sequence[int]) -> Iterator[tuple[range, Tensor]]:
        """Scores of all targets, a shard of training examples at a time.

        Args:
            directions: preconditioned targets for each checkpoint, ``(num_targets, k)`` each.
            shards: which shards.

        Yields:
            The training examples and their scores ``(num_targets, len(examples))``.
        """
        count = self.store.num_checkpoints
        for shard in shards:
            products: Tensor | None = None
            residuals: Tensor | None = None
            for checkpoint, direction in enumerate(directions):
                rows = self.store.read(checkpoint, shard)
                product = direction @ rows.features.to(direction).T
                residual = rows.residuals.to(direction)
                if self.residuals == "per_checkpoint":
                    product *= residual
                products = product if products is None else products.add_(product)
                residuals = residual if residuals is None else residuals + residual
            assert products is not None
            assert residuals is not None
            scores = products / count
            if self.residuals == "averaged":
                scores *= residuals / count
            if self.soft_threshold:
                scores = torch.nn.functional.softshrink(scores, self.soft_threshold)
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
            directions: preconditioned targets for each checkpoint, ``(num_targets, k)`` each.
            top_k: keep only this many training examples for each target, without ever holding the rest.
            largest: whether ``top_k`` keeps the highest scores or the lowest.
            ranks: the processes that share the shards; all must call this with the same targets.

        Returns:
            On every rank a CPU Tensor ``(num_targets, num_train)``, or a :class:`~lightning_trak.scorers.TopK`.
        """
        with _full_precision(self._device):
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


def _full_precision(device: torch.device) -> torch.autocast:
    """Outside autocast, under which Lightning's mixed precision or the user's own would round products."""
    return torch.autocast(device.type, enabled=False)
