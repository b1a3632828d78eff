"""TRAK scores from stored features: one Newton step for each training example, averaged over checkpoints."""

import warnings
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.base import Scorer, full_precision
from lightning_trak.scoring.damping import Damping, Noise, auto_damping, ends
from lightning_trak.scoring.gram import Curvature, DampedGram, gram_matrix, row_blocks

LossGradients = Literal["per_checkpoint", "averaged"]

_CACHE_FORMAT = 3  # of a stored Gram matrix; one of another format is made again


class TRAKScorer(Scorer):
    """tau(x)_i = 1/M sum_m phi_m(x)^T (K_m + lambda_m I)^-1 phi_m(i) Q_m(i).

    A positive score says that training on i raises the output at x, in the unit of the output. K_m = sum_j R_m(j)
    phi_m(j) phi_m(j)^T is the Hessian of the linearised model's loss. So tau(x)_i is what training example i adds to
    the output at x by one Newton step (Pregibon 1981; Park et al. 2023, arXiv 2303.14186, section 3).

    Args:
        store: complete features of the training set.
        curvature: how K weighs examples, see :func:`~lightning_trak.scoring.gram.gram_matrix`.
        damping: lambda_m relative to the mean eigenvalue of K_m; ``"auto"`` chooses it for each checkpoint, see
            :func:`~lightning_trak.scoring.damping.auto_damping`.
        loss_gradients: how Q is averaged: ``"per_checkpoint"`` as above; ``"averaged"`` as published (arXiv 2303.14186,
            section 3): the average of phi^T K^-1 phi over checkpoints times the average of Q.
        soft_threshold: scores move towards zero by this much, and stop there: the paper's optional sparsification. If
            fewer than ``top_k`` scores are left, the rest are zeros of arbitrary training examples.
    """

    def __init__(
        self,
        store: FeatureStore,
        curvature: Curvature,
        damping: Damping,
        loss_gradients: LossGradients,
        soft_threshold: float,
    ) -> None:
        super().__init__(store)
        self.curvature: Curvature = curvature
        self.damping: Damping = damping
        self.loss_gradients = loss_gradients
        self.soft_threshold = soft_threshold
        self._factors: list[DampedGram] = []
        self._keeps = True  # until a Gram matrix cannot be written

    def fit(self, device: torch.device, ranks: Ranks = Ranks()) -> None:  # noqa: B008
        """Make and factor the Gram matrices.

        Args:
            device: where scores will be computed.
            ranks: the processes that share the work; all must call this.

        Raises:
            RuntimeError: if the store is incomplete.
            ValueError: if a Gram matrix cannot be factored.
        """
        before = self._device
        super().fit(device, ranks)
        if self._factors and self._device == before:
            return
        self._factors = []
        dampings, noise = [], self._noise(ranks) if self.damping == "auto" else None
        levels = [] if noise is None else noise.levels(weighted=self.curvature == "gauss_newton")
        for checkpoint in range(self.store.num_checkpoints):
            gram, squared_weights = (tensor.to(self._device) for tensor in self._gram(checkpoint, ranks))
            damping = self.damping
            if damping == "auto":
                damping = auto_damping(gram.trace(), squared_weights, len(gram), levels[checkpoint])
            dampings.append(damping)
            precision = self.store.read(checkpoint, 0).features.dtype
            self._factors.append(DampedGram(gram, damping, precision, f"checkpoint {checkpoint}"))
        if noise is not None:
            place = "checkpoint" if len(dampings) == 1 else "checkpoints"
            why = noise.describe(weighted=self.curvature == "gauss_newton")
            rank_zero_info(f"TRAK: damping='auto' is {ends(dampings, 3)} at the {place}{why}")

    def _noise(self, ranks: Ranks) -> Noise:
        """From the loss gradients and curvatures of all training examples, which ranks share out."""
        noise = Noise(self.store.num_checkpoints)
        for shard in ranks.share(self.store.num_shards):
            rows = [self.store.read(checkpoint, shard) for checkpoint in range(self.store.num_checkpoints)]
            noise.add(
                torch.stack([part.loss_gradients for part in rows]), torch.stack([part.curvatures for part in rows])
            )
        noise.sums = ranks.sum(noise.sums)
        return noise

    def _gram(self, checkpoint: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        name, key = f"gram-{self.curvature}", f"{_CACHE_FORMAT}:{self.store.digest(checkpoint)}"
        stored = self.store.read_extra(checkpoint, name, key)
        if ranks.all_true(stored is not None) and stored is not None:
            return stored["gram"], stored["squared_weights"]
        k = self.store.read(checkpoint, 0).features.shape[1]
        blocks = row_blocks(self.store.num_shards, self.store.shard_size)
        mine = (self.store.read(checkpoint, shard) for number in ranks.share(len(blocks)) for shard in blocks[number])
        with full_precision(self._device):
            gram, squared_weights = map(ranks.sum, gram_matrix(mine, self.curvature, k, self._device))
        if ranks.rank == 0 and self._keeps:
            try:
                self.store.write_extra(checkpoint, name, {"gram": gram, "squared_weights": squared_weights}, key)
            except OSError as error:  # the store may be read-only, or the disk full
                self._keeps = False
                warnings.warn(f"the Gram matrix cannot be kept and will be made again next time: {error}", stacklevel=2)
        return gram, squared_weights

    def precondition(self, checkpoint: int, features: Tensor) -> Tensor:
        """(K_m + lambda_m I)^-1 phi(x) for each target: shape ``(num_targets, k)``, in at least float32."""
        return self._factors[checkpoint].solve(self._working(features))

    def directions(self, checkpoint: int, targets: Features) -> Tensor:
        """Preconditioned features, see :meth:`precondition`."""
        return self.precondition(checkpoint, targets.features)

    def weights(self, checkpoint: int, rows: Features) -> Tensor | None:  # noqa: ARG002
        """Q, or None if the average of Q is multiplied later, by :meth:`finish`."""
        return rows.loss_gradients if self.loss_gradients == "per_checkpoint" else None

    def finish(self, sums: Tensor, shard: int) -> Tensor:
        """The mean over checkpoints, times the mean of Q if that is averaged apart, and moved towards zero if asked."""
        scores = sums / self.store.num_checkpoints
        if self.loss_gradients == "averaged":
            rows = [self.store.read(checkpoint, shard) for checkpoint in range(self.store.num_checkpoints)]
            scores *= torch.stack([part.loss_gradients for part in rows]).mean(0).to(scores)
        return torch.nn.functional.softshrink(scores, self.soft_threshold) if self.soft_threshold else scores
