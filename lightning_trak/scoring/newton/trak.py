"""TRAK scores from stored features: one Newton step for each training example, averaged over checkpoints."""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.features.rows import Features, StoredFeatures
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.base import Scorer, full_precision
from lightning_trak.scoring.damping import Damping, auto_damping
from lightning_trak.scoring.newton.gram import Curvature, DampedGram
from lightning_trak.scoring.newton.kernel import DampedKernel
from lightning_trak.scoring.newton.lag import Lag, find_lag
from lightning_trak.scoring.newton.noise import Noise, stored_noise
from lightning_trak.scoring.newton.per_prediction import SEVERAL, WHOLE, dispersion
from lightning_trak.scoring.newton.rounding import OwnRounding, RoundingEffect, warn_of_rounding
from lightning_trak.scoring.newton.temperature import Tempered
from lightning_trak.scoring.newton.undamped import System, Undamped
from lightning_trak.texts.messages import extremes

LossGradients = Literal["per_checkpoint", "averaged"]


_CACHE_FORMAT = 3  # of a stored Gram matrix; one of another format is made again
_SYSTEM_BYTES = 1 << 32  # of factors in memory; those of more checkpoints are made again when they are needed


class TRAKScorer(Scorer):
    """tau(x)_i = 1/M sum_m phi_m(x)^T (K_m + lambda_m I)^-1 phi_m(i) Q_m(i).

    A positive score says that training on i raises the output at x, in the unit of the output. K_m = sum_j R_m(j)
    phi_m(j) phi_m(j)^T, a sum over the examples that model m has seen, is the Hessian of the linearised model's loss.
    So tau(x)_i is what training example i adds to the output at x by one Newton step (Pregibon 1981; Park et al. 2023,
    arXiv 2303.14186, section 3).

    K_m has a row for each feature, and :class:`~lightning_trak.scoring.PrimalScorer` factors it. If there are fewer
    training examples than features, the same scores come from a matrix with a row for each example, see
    :class:`~lightning_trak.scoring.DualScorer`. :func:`~lightning_trak.scoring.smaller_scorer` chooses between them.

    Args:
        store: complete features of the training set.
        curvature: how K weighs examples, see :func:`~lightning_trak.scoring.newton.gram.gram_matrix`.
        damping: lambda_m relative to the mean eigenvalue of K_m; ``"auto"`` chooses it for each checkpoint, see
            :func:`~lightning_trak.scoring.damping.auto_damping`.
        loss_gradients: how Q is averaged: ``"per_checkpoint"`` as above; ``"averaged"`` as published (arXiv 2303.14186,
            section 3): the average of phi^T K^-1 phi over checkpoints times the average of Q.
        soft_threshold: scores move towards zero by this much, and stop there: the paper's optional sparsification. If
            fewer than ``top_k`` scores are left, the rest are zeros of arbitrary training examples.
        subsets: for each checkpoint, the examples that its model has seen; None: all. An example that it has not seen
            is not part of K_m, and is scored, too: by the step of adding it. Default: all models have seen all.
        tempered: what gives Q in the place of the stored one, with loss_gradients="per_checkpoint". K_m, and with it
            lambda_m, stay as they are. Default: the stored Q.
        lag: how far each training is from its end, where something is chosen by it; ``"auto"`` measures it, see
            :mod:`lightning_trak.scoring.newton.lag`.
        averages: whether each example's loss is a mean over several predictions, such as its tokens.
        curved: features of single predictions for the same examples, which K_m is made of, too, see
            :mod:`lightning_trak.scoring.newton.per_prediction`. The lag is not measured then. Default: K_m is as above.
    """

    user: ClassVar[str] = "TRAK"  # in log lines

    def __init__(
        self,
        store: FeatureStore,
        curvature: Curvature,
        damping: Damping,
        loss_gradients: LossGradients,
        soft_threshold: float,
        subsets: Sequence[TrainingSubset | None] | None = None,
        tempered: Tempered | None = None,
        lag: Lag = "auto",
        averages: bool = False,
        curved: FeatureStore | None = None,
    ) -> None:
        super().__init__(store)
        self.curved = curved
        # What K_m is made of, each with its share.
        self.sources = [(store, 1.0)] if curved is None else [(store, WHOLE), (curved, 1 - WHOLE)]
        self.curvature: Curvature = curvature
        self.damping: Damping = damping
        self.loss_gradients = loss_gradients
        self.soft_threshold = soft_threshold
        self.subsets = [None] * store.num_checkpoints if subsets is None else subsets
        self.tempered = tempered
        self.lag: Lag = lag
        self.averages = averages
        self.noise: Noise | None = None  # of the training examples, where something is chosen by it
        self._lags_known: set[int] = set()  # checkpoints
        self._systems: dict[int, tuple[System, float]] = {}  # with their dampings, of as many checkpoints as fit
        self._keeps = True  # until a matrix cannot be written

    def fit(self, device: torch.device, ranks: Ranks = Ranks()) -> None:
        """Make and factor the matrices.

        Args:
            device: where scores will be computed.
            ranks: the processes that share the work; all must call this.

        Raises:
            RuntimeError: if the store is incomplete.
            ValueError: if a matrix cannot be factored.
        """
        before = self._device
        super().fit(device, ranks)
        if self._systems and self._device == before:
            return
        self._systems = {}
        chooses = self.tempered is not None and self.tempered.automatic
        if self.noise is None and (self.damping == "auto" or chooses):
            self.noise = stored_noise(self.store, self.subsets, self.averages, ranks)
            if self.curved is not None:
                self.noise.scale = SEVERAL
                self.noise.known = [self._dispersion(self.curved, number) for number in range(len(self.subsets))]
            if self.lag != "auto":
                self.noise.lags = [self.lag] * self.store.num_checkpoints
        dampings, effects = [], []
        for checkpoint in range(self.store.num_checkpoints):
            dampings.append(self._system(checkpoint, ranks)[1])
            if self.store.rounds_features:
                effects.append(self._rounding(checkpoint))
                effects[-1].require_small()
        warn_of_rounding(effects)
        if self.tempered is not None:
            self._settled = self.tempered.settled(self.noise)
        if chooses:
            rank_zero_info(f"{self.user}: temperature='auto' is {self._settled.temperature:.3g}")
        if self.damping == "auto" and self.noise is not None:
            place = "checkpoint" if len(dampings) == 1 else "checkpoints"
            about = self.noise.describe(self.curvature == "gauss_newton")
            rank_zero_info(f"{self.user}: damping='auto' is {extremes(dampings, 3)} at the {place}{about}")

    def _dispersion(self, curved: FeatureStore, checkpoint: int) -> float:
        """That of single predictions, over the examples that the checkpoint's model has seen."""
        found = [curved.read_stored(checkpoint, shard).outputs for shard in range(curved.num_shards)]
        seen, subset = torch.ones(curved.num_examples, dtype=torch.bool), self.subsets[checkpoint]
        if subset is not None:
            seen &= subset.mask
        seen[curved.skipped] = False
        return dispersion(torch.cat(found)[seen])

    def _system(self, checkpoint: int, ranks: Ranks = Ranks()) -> tuple[System, float]:
        """The factored matrix of a checkpoint, and its damping. It is made again if others have taken its place."""
        if checkpoint not in self._systems:
            while len(self._systems) >= max(1, _SYSTEM_BYTES // self._system_bytes):
                self._systems.popitem()  # the last one: checkpoints come in order again and again
            self._systems[checkpoint] = self._factored(checkpoint, ranks)
        return self._systems[checkpoint]

    @property
    def _system_bytes(self) -> int:
        return int(8 * self.num_rows**2)

    @property
    def remade_bytes(self) -> int:
        """See :attr:`Scorer.remade_bytes`: that of the factors which do not fit in memory together."""
        fit = self._system_bytes * self.store.num_checkpoints <= max(_SYSTEM_BYTES, self._system_bytes)
        return 0 if fit else self._system_bytes

    def _factored(self, checkpoint: int, ranks: Ranks) -> tuple[System, float]:
        """See :meth:`_system`. The lag of the checkpoint is found first, where something is chosen by it."""
        matrix, noise, weighted = self._undamped(checkpoint, ranks), self.noise, self.curvature == "gauss_newton"

        def automatic(factor: float = 1.0) -> float:
            level = factor * cast(Noise, noise).levels(weighted)[checkpoint]
            return auto_damping(matrix.trace, matrix.squared_weights, self.num_features, level)

        measured = self.lag == "auto" and self.curved is None
        if measured and noise is not None and weighted and checkpoint not in self._lags_known:
            scaled = bool(noise.scaled[checkpoint])
            noise.lags[checkpoint] = find_lag(lambda factor: matrix.alignment(automatic(factor), scaled))
            self._lags_known.add(checkpoint)
        damping = automatic() if self.damping == "auto" else self.damping
        return matrix.damped(damping), damping

    @abstractmethod
    def _undamped(self, checkpoint: int, ranks: Ranks) -> Undamped[DampedGram] | Undamped[DampedKernel]:
        """The matrix of a checkpoint. All ranks make it together."""

    def _about(self, checkpoint: int) -> tuple[torch.dtype, str]:
        """The dtype of the features, and what to call their matrix in errors."""
        return self.store.read_stored(checkpoint, 0).dtype.floating, f"checkpoint {checkpoint}"

    def _rounding(self, checkpoint: int) -> RoundingEffect:
        """What rounding changes in the scores of a checkpoint."""
        system, damping = self._system(checkpoint)
        return RoundingEffect(system.score_noise(self.store.dtype.error), self._about(checkpoint)[1], damping)

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """The number of rows of the matrix that is factored."""

    @property
    def num_features(self) -> int:
        """k, the size of K."""
        return self.store.read_stored(0, 0).k

    @property
    def linear(self) -> bool:
        """Not if scores are moved towards zero."""
        return not self.soft_threshold

    @property
    def additive(self) -> bool:
        """Not if scores are moved towards zero."""
        return not self.soft_threshold

    def outputs_without_itself(self, ranks: Ranks = Ranks()) -> Tensor:
        """The output that the models would have at each training example without the example.

        It is f(i) minus what the example adds to it, its score at itself, averaged over checkpoints. A model that has
        not seen the example has this output already.

        Args:
            ranks: the processes that share the shards; all must call this.

        Returns:
            On every rank a CPU Tensor ``(num_train,)`` in float64, in the unit of the output.

        Raises:
            ValueError: if Q is averaged apart, so that no checkpoint has scores of its own.
        """
        if self.loss_gradients == "averaged":
            raise ValueError('loss_gradients="averaged" gives no scores of single checkpoints')
        shards = ranks.share(self.store.num_shards)
        outputs = torch.zeros(self.store.num_examples, dtype=torch.float64)
        with full_precision(self._device):
            for checkpoint, subset in enumerate(self.subsets):
                for shard, products in zip(shards, self.own_products(checkpoint, shards, ranks), strict=True):
                    examples, added = self.store.shard(shard), products.cpu().double()
                    span = slice(examples.start, examples.stop)
                    if subset is not None:
                        added = added * subset.mask[span]
                    outputs[span] += self.store.read_stored(checkpoint, shard).outputs.cpu() - added
        return ranks.sum(outputs) / self.store.num_checkpoints

    def own_products(self, checkpoint: int, shards: Sequence[int], ranks: Ranks) -> Iterator[Tensor]:
        """See :meth:`Scorer.own_products`.

        Raises:
            ValueError: after the last shard, if rounding to integers makes up more than a half of the products.
        """
        system, damping = self._system(checkpoint, ranks)
        error, weighted = self.store.dtype.error, self.curvature == "gauss_newton"
        rounding = OwnRounding(error**2 * system.mean_inverse() if error else 0.0)
        subset, (_, share) = self.subsets[checkpoint], self.sources[0]
        for shard, (products, squares) in zip(shards, self._own(checkpoint, shards, ranks), strict=True):
            rows, examples = self.store.read_stored(checkpoint, shard), self.store.shard(shard)
            curvatures = share * rows.curvatures.to(products) if weighted else torch.full_like(products, share)
            if subset is not None:
                curvatures = curvatures * subset.mask[examples.start : examples.stop].to(products)
            rounding.count(products, squares, curvatures)
            yield self._weighted(products.to(self._dtype), checkpoint, rows)
        rounding.check(self._about(checkpoint)[1], damping, ranks)

    @abstractmethod
    def _own(self, checkpoint: int, shards: Sequence[int], ranks: Ranks) -> Iterator[tuple[Tensor, Tensor]]:
        """phi_i^T (K_m + lambda_m I)^-1 phi_i and |phi_i|^2 of the examples of each shard: float64, shape ``(n,)``."""

    def _weighted(self, solved: Tensor, checkpoint: int, rows: StoredFeatures) -> Tensor:
        """Scores of the examples with these rows, times their :meth:`weights`."""
        weights = self.weights(checkpoint, rows)
        return solved if weights is None else solved * weights.to(solved)

    def _kept(
        self,
        store: FeatureStore,
        checkpoint: int,
        name: str,
        about: str,
        ranks: Ranks,
        make: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """A matrix from the cache of a store. If one rank does not find it there, all make it."""
        key = f"{_CACHE_FORMAT}:{store.digest(checkpoint)}{about}"
        stored = store.read_extra(checkpoint, name, key)
        if ranks.all_true(stored is not None) and stored is not None:
            return stored
        with full_precision(self._device):
            made = make()
        if ranks.rank == 0 and self._keeps:
            try:
                store.write_extra(checkpoint, name, made, key)
            except OSError as error:  # the store may be read-only, or the disk full
                self._keeps = False
                warnings.warn(f"the Gram matrix cannot be kept and will be made again next time: {error}", stacklevel=2)
        return made

    @abstractmethod
    def precondition(self, checkpoint: int, features: Tensor) -> Tensor:
        """What :meth:`score` takes for each target: shape ``(num_targets, k)``, in at least float32."""

    def directions(self, checkpoint: int, targets: Features) -> Tensor:
        """Preconditioned features, see :meth:`precondition`."""
        return self.precondition(checkpoint, targets.features)

    def weights(self, checkpoint: int, rows: Features | StoredFeatures) -> Tensor | None:
        """Q, or None if the average of Q is multiplied later, by :meth:`finish`."""
        if self.loss_gradients == "averaged":
            return None
        if self.tempered is None:
            return rows.loss_gradients
        return self._settled.loss_gradients(rows.outputs)

    def finish(self, sums: Tensor, loss_gradients: Callable[[], Tensor]) -> Tensor:
        """The mean over checkpoints, times the mean of Q if that is averaged apart, and moved towards zero if asked."""
        scores = sums.div_(self.store.num_checkpoints)
        if self.loss_gradients == "averaged":
            scores *= loss_gradients().to(scores)
        return torch.nn.functional.softshrink(scores, self.soft_threshold) if self.soft_threshold else scores
