"""TRAK scores from stored features: one Newton step for each training example, averaged over checkpoints."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, Literal, TypedDict, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.features.rows import Features, StoredFeatures
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.base import Scorer, full_precision
from lightning_trak.scoring.damping import Damping, auto_damping, ends
from lightning_trak.scoring.dual import DualSystem, kernel_matrix, products_with
from lightning_trak.scoring.gram import Curvature, DampedGram, gram_matrix, require_convex, row_blocks
from lightning_trak.scoring.groups import Sums
from lightning_trak.scoring.lag import Lag, find_lag, residual_sums
from lightning_trak.scoring.noise import Noise, stored_noise
from lightning_trak.scoring.temperature import Tempered
from lightning_trak.scoring.topk import Scores
from lightning_trak.scoring.undamped import System, Undamped

LossGradients = Literal["per_checkpoint", "averaged"]


class Lagging(TypedDict, total=False):
    """What the automatic choices of a scorer need to know of the training, see :class:`TRAKScorer`."""

    lag: Lag
    averages: bool


_CACHE_FORMAT = 3  # of a stored Gram matrix; one of another format is made again
_SYSTEM_BYTES = 1 << 32  # of factors in memory; those of more checkpoints are made again when they are needed


class TRAKScorer(Scorer):
    """tau(x)_i = 1/M sum_m phi_m(x)^T (K_m + lambda_m I)^-1 phi_m(i) Q_m(i).

    A positive score says that training on i raises the output at x, in the unit of the output. K_m = sum_j R_m(j)
    phi_m(j) phi_m(j)^T, a sum over the examples that model m has seen, is the Hessian of the linearised model's loss.
    So tau(x)_i is what training example i adds to the output at x by one Newton step (Pregibon 1981; Park et al. 2023,
    arXiv 2303.14186, section 3).

    K_m has a row for each feature. If there are fewer training examples than features, the same scores come from a
    matrix with a row for each example: see :mod:`lightning_trak.scoring.dual`.

    Args:
        store: complete features of the training set.
        curvature: how K weighs examples, see :func:`~lightning_trak.scoring.gram.gram_matrix`.
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
            :mod:`lightning_trak.scoring.lag`.
        averages: whether each example's loss is a mean over several predictions, such as its tokens.
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
    ) -> None:
        super().__init__(store)
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
        self._dual = False
        self._systems: dict[int, tuple[System, float]] = {}  # with their dampings, of as many checkpoints as fit
        self._keeps = True  # until a matrix cannot be written

    def fit(self, device: torch.device, ranks: Ranks = Ranks()) -> None:  # noqa: B008
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
        self._dual = self.solves_dual(self.store.num_examples, self.num_features)
        chooses = self.tempered is not None and self.tempered.automatic
        if self.noise is None and (self.damping == "auto" or chooses):
            self.noise = stored_noise(self.store, self.subsets, self.averages, ranks)
            if self.lag != "auto":
                self.noise.lags = [self.lag] * self.store.num_checkpoints
        dampings = [self._system(checkpoint, ranks)[1] for checkpoint in range(self.store.num_checkpoints)]
        if self.tempered is not None:
            self._settled = self.tempered.settled(self.noise)
        if chooses:
            rank_zero_info(f"{self.user}: temperature='auto' is {self._settled.temperature:.3g}")
        if self.damping == "auto" and self.noise is not None:
            place = "checkpoint" if len(dampings) == 1 else "checkpoints"
            about = self.noise.describe(self.curvature == "gauss_newton")
            rank_zero_info(f"{self.user}: damping='auto' is {ends(dampings, 3)} at the {place}{about}")

    def _system(self, checkpoint: int, ranks: Ranks = Ranks()) -> tuple[System, float]:  # noqa: B008
        """The factored matrix of a checkpoint, and its damping. It is made again if others have taken its place."""
        if checkpoint not in self._systems:
            size = self.store.num_examples if self._dual else self.num_features
            while len(self._systems) >= max(1, _SYSTEM_BYTES // (8 * size**2)):
                del self._systems[next(iter(self._systems))]
            self._systems[checkpoint] = self._factored(checkpoint, ranks)
        return self._systems[checkpoint]

    def _factored(self, checkpoint: int, ranks: Ranks) -> tuple[System, float]:
        """See :meth:`_system`. The lag of the checkpoint is found first, where something is chosen by it."""
        matrix = (self._dual_matrix if self._dual else self._primal_matrix)(checkpoint, ranks)
        noise, weighted = self.noise, self.curvature == "gauss_newton"

        def automatic(factor: float = 1.0) -> float:
            level = factor * cast(Noise, noise).levels(weighted)[checkpoint]
            return auto_damping(matrix.trace, matrix.squared_weights, self.num_features, level)

        if self.lag == "auto" and noise is not None and weighted and checkpoint not in self._lags_known:
            scaled = bool(noise.scaled[checkpoint])
            noise.lags[checkpoint] = find_lag(lambda factor: matrix.alignment(automatic(factor), scaled))
            self._lags_known.add(checkpoint)
        damping = automatic() if self.damping == "auto" else self.damping
        return matrix.damped(damping), damping

    def _dual_matrix(self, checkpoint: int, ranks: Ranks) -> Undamped:
        kernel, curvatures = self._kernel(checkpoint, ranks), self._curvatures(checkpoint)
        weights, about = curvatures * kernel.diagonal(), self._about(checkpoint)

        def factor(damping: float) -> DualSystem:
            return DualSystem(kernel, curvatures, damping, self.num_features, *about, self._device)

        def residual_step(system: System) -> tuple[float, float]:
            residuals = self._residuals(checkpoint)
            step = cast(DualSystem, system).squared_step(residuals, kernel)
            return step, float(residuals.square() @ kernel.diagonal())

        return Undamped(weights.sum(), weights.square().sum(), factor, residual_step)

    def _primal_matrix(self, checkpoint: int, ranks: Ranks) -> Undamped:
        gram, squared_weights = (tensor.to(self._device) for tensor in self._gram(checkpoint, ranks))
        precision, error, place = self._about(checkpoint)

        @cache  # all ranks must make it together, however many dampings each tries
        def residuals() -> tuple[Tensor, Tensor]:
            return self._pull(checkpoint, ranks)

        def residual_step(system: System) -> tuple[float, float]:
            pull, squares = residuals()
            return cast(DampedGram, system).squared_step(pull.to(self._device)), float(squares)

        def factor(damping: float) -> DampedGram:
            return DampedGram(gram, damping, precision, place, rounding_error=error)

        return Undamped(gram.trace(), squared_weights, factor, residual_step)

    def _about(self, checkpoint: int) -> tuple[torch.dtype, float, str]:
        """The dtype of the features, by how much they are rounded, and what to call their matrix in errors."""
        precision = self.store.read_stored(checkpoint, 0).dtype.floating
        return precision, self.store.rounding_error(checkpoint), f"checkpoint {checkpoint}"

    @property
    def num_features(self) -> int:
        """k, the size of K."""
        return self.store.read_stored(0, 0).k

    @property
    def linear(self) -> bool:
        """Not if scores are moved towards zero."""
        return not self.soft_threshold

    def solves_dual(self, n: int, k: int) -> bool:
        """Whether the system of n examples is solved, and not that of k features."""
        if n < k:
            rank_zero_info(f"TRAK: solves {n} x {n} (examples) instead of {k} x {k} (features), since n is smaller")
        return n < k

    @property
    def additive(self) -> bool:
        """Not if scores are moved towards zero."""
        return not self.soft_threshold

    def _gram(self, checkpoint: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        def make() -> dict[str, Tensor]:
            mine = self._seen(checkpoint, ranks)
            sums = gram_matrix(mine, self.curvature, self.num_features, self._device)
            return dict(zip(("gram", "squared_weights"), map(ranks.sum, sums), strict=True))

        kept = self._kept(checkpoint, f"gram-{self.curvature}", self._seen_key(checkpoint), ranks, make)
        return kept["gram"], kept["squared_weights"]

    def _pull(self, checkpoint: int, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """See :func:`~lightning_trak.scoring.lag.residual_sums`."""

        def make() -> dict[str, Tensor]:
            sums = residual_sums(self._seen(checkpoint, ranks), self.num_features, self._device)
            return dict(zip(("pull", "squared_residuals"), map(ranks.sum, sums), strict=True))

        kept = self._kept(checkpoint, "residuals", self._seen_key(checkpoint), ranks, make)
        return kept["pull"], kept["squared_residuals"]

    def _seen_key(self, checkpoint: int) -> str:
        """What the key of a sum over the examples that a checkpoint's model has seen says of them."""
        subset = self.subsets[checkpoint]
        return "" if subset is None else f":{subset.digest}"

    def _kernel(self, checkpoint: int, ranks: Ranks) -> Tensor:
        """Inner products of the features of all training examples: float64, shape ``(n, n)``, on the CPU."""

        def make() -> dict[str, Tensor]:
            return {"kernel": kernel_matrix(self.store, checkpoint, self._device, ranks).cpu()}

        return self._kept(checkpoint, "kernel", "", ranks, make)["kernel"]

    def _products(self, checkpoint: int, targets: Tensor, ranks: Ranks) -> Tensor:
        """Inner products of the features of targets and of all training examples: float64, ``(num_targets, n)``."""
        return products_with(self.store, checkpoint, targets, ranks)

    def _curvatures(self, checkpoint: int) -> Tensor:
        """R of all training examples, or ones; 0 for those that the model has not seen. float64, shape ``(n,)``."""
        shards = (self.store.read_stored(checkpoint, shard).curvatures for shard in range(self.store.num_shards))
        curvatures = torch.cat(list(shards)).double()
        if self.curvature == "identity":
            curvatures = torch.ones_like(curvatures)
        require_convex(curvatures, 'curvature="identity"')
        return self._where_seen(checkpoint, curvatures)

    def _residuals(self, checkpoint: int) -> Tensor:
        """Q of all training examples; 0 for those that the model has not seen. float64, shape ``(n,)``."""
        shards = (self.store.read_stored(checkpoint, shard).loss_gradients for shard in range(self.store.num_shards))
        return self._where_seen(checkpoint, torch.cat(list(shards)).double())

    def _where_seen(self, checkpoint: int, values: Tensor) -> Tensor:
        subset = self.subsets[checkpoint]
        return values if subset is None else values * subset.mask

    def _kept(
        self, checkpoint: int, name: str, about: str, ranks: Ranks, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """A matrix from the store's cache. If one rank does not find it there, all make it."""
        key = f"{_CACHE_FORMAT}:{self.store.digest(checkpoint)}{about}"
        stored = self.store.read_extra(checkpoint, name, key)
        if ranks.all_true(stored is not None) and stored is not None:
            return stored
        with full_precision(self._device):
            made = make()
        if ranks.rank == 0 and self._keeps:
            try:
                self.store.write_extra(checkpoint, name, made, key)
            except OSError as error:  # the store may be read-only, or the disk full
                self._keeps = False
                warnings.warn(f"the Gram matrix cannot be kept and will be made again next time: {error}", stacklevel=2)
        return made

    def _seen(self, checkpoint: int, ranks: Ranks) -> Iterator[Features]:
        """This rank's share of the rows of examples that the checkpoint's model has seen, in blocks of shards."""
        subset = self.subsets[checkpoint]
        blocks = row_blocks(self.store.num_shards, self.store.shard_size)
        for shard in (shard for part in ranks.share(len(blocks)) for shard in blocks[part]):
            rows, examples = self.store.read_stored(checkpoint, shard), self.store.shard(shard)
            if subset is not None:
                rows = rows[subset.mask[examples.start : examples.stop]]
            yield from rows.moved(lambda codes: codes.to(self._device)).blocks()

    def precondition(self, checkpoint: int, features: Tensor) -> Tensor:
        """What :meth:`score` takes for each target: shape ``(num_targets, k)``, in at least float32.

        In the primal it is (K_m + lambda_m I)^-1 phi(x). In the dual it is phi(x), and :meth:`score` solves.
        """
        features = self._working(features)
        return features if self._dual else self._system(checkpoint)[0].solve(features)

    def directions(self, checkpoint: int, targets: Features) -> Tensor:
        """Preconditioned features, see :meth:`precondition`."""
        return self.precondition(checkpoint, targets.features)

    def score(
        self,
        directions: Sequence[Tensor],
        top_k: int | None = None,
        largest: bool | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008
        columns: Sums | None = None,
    ) -> Scores:
        """See :meth:`Scorer.score`. The dual reads the features once for all targets, and solves n x n."""
        if not self._dual:
            return super().score(directions, top_k, largest, ranks, columns)
        solved = []
        with full_precision(self._device):
            for checkpoint, features in enumerate(directions):
                products = self._products(checkpoint, features, ranks)
                solved.append(self._system(checkpoint)[0].solve(products).to(features))
        return super().score(solved, top_k, largest, ranks, columns)

    def block(self, directions: Sequence[Tensor], shard: int, rows: Iterator[StoredFeatures]) -> Tensor:
        """See :meth:`Scorer.block`. The dual's solutions are scores already, and no features are read."""
        if not self._dual:
            return super().block(directions, shard, rows)
        examples, total = self.store.shard(shard), directions[0].new_zeros(())
        for checkpoint, direction in enumerate(directions):
            total = total + self._weighted(direction[:, examples.start : examples.stop], checkpoint, shard)
        return self.finish(total, self._loss_gradients_of(shard))

    def prepare_others(self, directions: Sequence[Tensor], ranks: Ranks) -> Sequence[Any]:
        """See :meth:`Scorer.prepare_others`. The dual needs the scores of the stored examples, too."""
        if not self._dual:
            return directions
        products = [self._products(checkpoint, features, ranks) for checkpoint, features in enumerate(directions)]
        solved = [self._system(checkpoint)[0].solve(product) for checkpoint, product in enumerate(products)]
        return list(zip(directions, solved, strict=True))

    def products_with_others(self, checkpoint: int, prepared: Any, features: Tensor) -> Tensor:
        """See :meth:`Scorer.products_with_others`. The dual reads the stored features of the checkpoint."""
        if not self._dual:
            return super().products_with_others(checkpoint, prepared, features)
        (targets, solved), features = prepared, self._working(features)
        system = self._system(checkpoint)[0]
        assert isinstance(system, DualSystem)
        own = self._products_between(checkpoint, targets, features)
        return system.outside(solved, own, self._products(checkpoint, features, Ranks())).to(targets)

    def _products_between(self, checkpoint: int, targets: Tensor, others: Tensor) -> Tensor:  # noqa: ARG002
        """Inner products of targets with other examples, in float64, shape ``(num_targets, n)``."""
        return targets.double() @ others.double().T

    def self_scores(self, ranks: Ranks = Ranks()) -> Tensor:  # noqa: B008
        """See :meth:`Scorer.self_scores`."""
        if not self._dual:
            return super().self_scores(ranks)
        like, mine = self._working(self.store.read(0, 0).features[:0]), ranks.share(self.store.num_shards)
        sums = like.new_zeros(self.store.num_examples)
        for checkpoint in range(self.store.num_checkpoints):
            kernel, (system, _) = self._kernel(checkpoint, ranks), self._system(checkpoint)
            assert isinstance(system, DualSystem)
            for shard, examples in ((shard, self.store.shard(shard)) for shard in mine):
                own = system.own(kernel[examples.start : examples.stop], examples).to(like)
                sums[examples.start : examples.stop] += self._weighted(own, checkpoint, shard)
        scores = torch.zeros(len(sums), dtype=like.dtype)
        for shard, examples in ((shard, self.store.shard(shard)) for shard in mine):
            found = self.finish(sums[examples.start : examples.stop], self._loss_gradients_of(shard))
            self._require_finite(found, examples)
            scores[examples.start : examples.stop] = found.cpu()
        return self._without_skipped(ranks.sum(scores))

    def _weighted(self, solved: Tensor, checkpoint: int, shard: int) -> Tensor:
        weights = self.weights(checkpoint, self.store.read_stored(checkpoint, shard))
        return solved if weights is None else solved * weights.to(solved)

    def weights(self, checkpoint: int, rows: Features | StoredFeatures) -> Tensor | None:  # noqa: ARG002
        """Q, or None if the average of Q is multiplied later, by :meth:`finish`."""
        if self.loss_gradients == "averaged":
            return None
        if self.tempered is None:
            return rows.loss_gradients
        return self._settled.loss_gradients(rows.outputs)

    def finish(self, sums: Tensor, loss_gradients: Callable[[], Tensor]) -> Tensor:
        """The mean over checkpoints, times the mean of Q if that is averaged apart, and moved towards zero if asked."""
        scores = sums / self.store.num_checkpoints
        if self.loss_gradients == "averaged":
            scores *= loss_gradients().to(scores)
        return torch.nn.functional.softshrink(scores, self.soft_threshold) if self.soft_threshold else scores
