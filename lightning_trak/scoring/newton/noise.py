"""What the automatic damping and temperature work against: how noisy the scores of the given models are."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.texts.messages import extremes

# Sums over all examples at each checkpoint, of R and of 1; and over those that its model has seen, of 1, Q^2 and R.
_COLUMNS = ("curvatures", "examples", "seen", "seen_squares", "seen_curvatures")


class Noise:
    """What a damping works against, from Q and R of the training examples at all checkpoints, in sums over examples.

    In Bayes' terms lambda is the variance of the labels' noise over the prior variance of the weights. Three things
    lower it: labels that the model fits perfectly, an average over checkpoints that differ, and models that have seen
    only a part of the examples. A training that stopped before the minimum raises it.

    Args:
        num_checkpoints: M.
        averages: whether each example's loss is a mean over several predictions, such as its tokens.

    Attributes:
        sums: one float64 Tensor ``(M, M + 5)``: products of R between checkpoints, and what :meth:`total` names. The
            sums of several processes can be added up.
        lags: how far each checkpoint's training is from its end, see :mod:`lightning_trak.scoring.newton.lag`: 1 until
            they are known.
        scale: what all levels are multiplied by.
        known: the dispersion at each checkpoint, if it is known from elsewhere.
    """

    def __init__(self, num_checkpoints: int, averages: bool = False) -> None:
        self.averages = averages
        self.sums = torch.zeros(num_checkpoints, num_checkpoints + len(_COLUMNS), dtype=torch.float64)
        self.lags = [1.0] * num_checkpoints
        self.scale = 1.0
        self.known: list[float] | None = None

    def add(self, loss_gradients: Tensor, curvatures: Tensor, seen: Tensor | None = None) -> None:
        """Add some examples.

        Args:
            loss_gradients: Q at each checkpoint, shape ``(M, n)``.
            curvatures: R, of the same shape.
            seen: bool, of the same shape: whether the checkpoint's model was trained on the example. Default: all.
        """
        gradients, values = loss_gradients.double().cpu(), curvatures.double().cpu()
        trained = torch.ones_like(values) if seen is None else seen.double().cpu()
        columns = values, torch.ones_like(values), trained, trained * gradients.square(), trained * values
        self.sums += torch.cat([values @ values.T, *(column.sum(1, keepdim=True) for column in columns)], dim=1)

    def total(self, name: str) -> Tensor:
        """A sum over examples at each checkpoint, see ``_COLUMNS``: shape ``(M,)``."""
        return self.sums[:, len(self.sums) + _COLUMNS.index(name)]

    @property
    def dispersions(self) -> list[float]:
        """The dispersion of the loss at each checkpoint: sum Q^2 / sum R over the examples seen, in [0.01, 1].

        It is the noise of the labels, relative to what the model's probabilities say: for a log-likelihood, E[Q^2] = R
        if the probabilities are right (McCullagh and Nelder 1989, Generalized Linear Models, chapter 9). It is near 0
        for a model that fits every label. If R is the same for all examples, as for a squared error, the loss says
        nothing about the scale of the noise; then it is 1.
        """
        if self.known is not None:
            return self.known
        ratios = torch.where(self.scaled, self.total("seen_squares") / self.total("seen_curvatures"), 1.0)
        return cast(list[float], ratios.clamp(0.01, 1).tolist())

    @property
    def scaled(self) -> Tensor:
        """Whether R differs between examples beyond rounding, so that it can be the scale of the noise: bool (M,)."""
        return self._covariances()[1]

    @property
    def shares(self) -> list[float]:
        """The share of the examples that each checkpoint's model has seen. Its K is smaller by as much."""
        return cast(list[float], (self.total("seen") / self.total("examples")).tolist())

    @property
    def agreement(self) -> float:
        """The mean of the correlation matrix of R between checkpoints: (1 + (M - 1) r) / M for a mean correlation r.

        It is the variance of the average of M estimates, relative to that of one (the design effect: Kish 1965, Survey
        Sampling): 1 for M times the same checkpoint, 1 / M for unrelated ones. Where R is the same for all examples, it
        counts as correlated.
        """
        covariances, varies = self._covariances()
        deviations = covariances.diagonal().clamp(min=0).sqrt()
        correlations = torch.where(torch.outer(varies, varies), covariances / torch.outer(deviations, deviations), 1.0)
        return float(correlations.mean().clamp(1 / len(correlations), 1))

    @property
    def factors(self) -> list[float]:
        """What the lags multiply the damping by: 1 where losses are means over predictions.

        There a lag raises the temperature alone. A measurement on texts showed that a larger damping is worse.
        """
        return [1.0] * len(self.lags) if self.averages else self.lags

    @property
    def temperature(self) -> float:
        """How much surer models are of examples that they have seen than of others, at least 1.

        It is lag^1.5 / sqrt(r), with r the mean correlation of R between two checkpoints, at least .09: what one
        checkpoint says correlates with the mean of many by sqrt(r) (Spearman 1910, for the reliability of a
        measurement). One checkpoint does not show r; then .49 takes its place. That and the power of the lags'
        geometric mean were found by measurement. It is 1 where R is the same for all examples.
        """
        size = len(self.sums)
        if not self.scaled.all():
            return 1.0
        correlation = 0.49 if size == 1 else (size * self.agreement - 1) / (size - 1)
        return math.prod(self.lags) ** (1.5 / size) / math.sqrt(max(correlation, 0.09))

    def levels(self, weighted: bool) -> list[float]:
        """The noise at each checkpoint: agreement^2 dispersion share factor scale. The square was found by measurement.

        It is for :func:`~lightning_trak.scoring.damping.auto_damping`.

        Args:
            weighted: whether K weighs examples by R. If not, their scale is unknown, and the dispersion is left out.
        """
        dispersions = self.dispersions if weighted else [1.0] * len(self.sums)
        parts = zip(dispersions, self.shares, self.factors, strict=True)
        return [self.scale * self.agreement**2 * dispersion * share * factor for dispersion, share, factor in parts]

    def describe(self, weighted: bool) -> str:
        """The parts of :meth:`levels` that are not 1 by definition, for a log line; it starts with a space if any."""
        parts = []
        if weighted:
            parts.append(f"the dispersion of the loss is {extremes(self.dispersions)}")
        if len(self.sums) > 1:
            parts.append(f"the agreement of the checkpoints {self.agreement:.2g}")
        if min(self.shares) < 1:
            parts.append(f"the share of the examples seen {extremes(self.shares)}")
        if max(self.factors) > 1:
            parts.append(f"the lag of the training {extremes(self.factors)}")
        return f" ({', '.join(parts)})" if parts else ""

    def _covariances(self) -> tuple[Tensor, Tensor]:
        """The covariance matrix of R between checkpoints, and at which of them R varies beyond rounding."""
        products, count = self.sums[:, : len(self.sums)], self.total("examples")
        means = self.total("curvatures") / count
        covariances = products / count - torch.outer(means, means)
        return covariances, covariances.diagonal() > 1e-9 * products.diagonal() / count


def stored_noise(
    store: FeatureStore,
    subsets: Sequence[TrainingSubset | None],
    averages: bool,
    ranks: Ranks,
) -> Noise:
    """What the automatic damping works against, from the loss gradients and curvatures of all training examples.

    Args:
        store: complete features.
        subsets: for each checkpoint, the examples that its model has seen; None: all.
        averages: as for :class:`Noise`.
        ranks: the processes that share the shards; all must call this.
    """
    noise = Noise(store.num_checkpoints, averages)
    for shard in ranks.share(store.num_shards):
        examples = store.shard(shard)
        rows = [store.read_stored(checkpoint, shard) for checkpoint in range(store.num_checkpoints)]
        all_seen = torch.ones(len(examples), dtype=torch.bool)
        seen = [all_seen if subset is None else subset.mask[examples.start : examples.stop] for subset in subsets]
        skipped = {i for checkpoint in store.first for i in store.skipped_of(checkpoint, shard)}
        kept = [row for row, position in enumerate(examples) if position not in skipped]
        noise.add(
            torch.stack([part.loss_gradients for part in rows])[:, kept],
            torch.stack([part.curvatures for part in rows])[:, kept],
            torch.stack(seen)[:, kept],
        )
    noise.sums = ranks.sum(noise.sums)
    return noise
