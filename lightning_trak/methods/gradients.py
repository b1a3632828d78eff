"""How alike are gradients of the loss? Products and cosines, averaged over checkpoints or weighed by learning rates."""

from pathlib import Path

from torch import nn
from typing_extensions import Unpack

from lightning_trak.checks import require_one_of
from lightning_trak.features.store import FeatureStore
from lightning_trak.gradients import select_parameters
from lightning_trak.methods.feature import Checkpoints, FeatureMethod, FeatureOptions
from lightning_trak.methods.learning_rates import LearningRates, resolve_learning_rates
from lightning_trak.scoring.gradient import EffectOn, GradientCosineScorer, GradientDotScorer


class _GradientMethod(FeatureMethod):
    """Compares gradients, with a weight for each checkpoint; the arguments are those of its subclasses."""

    _scorer: type[GradientDotScorer] = GradientDotScorer

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Checkpoints,
        store: str | Path,
        learning_rates: LearningRates | None,
        effect_on: EffectOn,
        **options: Unpack[FeatureOptions],
    ) -> None:
        require_one_of("effect_on", effect_on, ("loss", "output"))
        super().__init__(model, checkpoints, store, **options)
        count = len(self.checkpoints)
        self.effect_on: EffectOn = effect_on
        self.checkpoint_weights = (
            [1 / count] * count
            if learning_rates is None
            else resolve_learning_rates(
                learning_rates, self.checkpoints, lambda: select_parameters(self.model, self.parameters)
            )
        )

    def make_scorer(self, store: FeatureStore) -> GradientDotScorer:
        """Products or cosines of gradients."""
        return self._scorer(store, self.checkpoint_weights, self.effect_on)


class GradientDot(_GradientMethod):
    """Products of gradients, averaged over checkpoints: 1/M sum_m <grad l_m(x), grad l_m(i)>.

    A step of gradient descent on training example i, of a small size, lowers the loss at target x by the size times
    this product (Charpiat et al. 2019, "Input similarity from the neural network perspective"): a positive score says
    that training on i lowers the loss at x, or raises its output with ``effect_on="output"``.

    Args:
        model: as for :class:`~lightning_trak.TRAK`.
        checkpoints: as for :class:`~lightning_trak.TRAK`.
        store: as for :class:`~lightning_trak.TRAK`, and may be one that another method has filled.
        effect_on: ``"loss"``, or ``"output"`` for the gradient of the output at the target in place of that of its
            loss. They differ in more than scale where the loss can rise with the output: a prediction that is too high
            is helped by what lowers it.
        **options: ``output``, ``projection``, ``parameters``, ``engine``, ``seed``, ``dtype`` and ``weights_only``, as
            for :class:`~lightning_trak.TRAK`. With :class:`~lightning_trak.projections.IdentityProjection` the products
            are exact, with others estimates.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Checkpoints,
        store: str | Path,
        *,
        effect_on: EffectOn = "loss",
        **options: Unpack[FeatureOptions],
    ) -> None:
        super().__init__(model, checkpoints, store, None, effect_on, **options)


class TracIn(_GradientMethod):
    """Products of gradients, weighed by learning rates: sum_m eta_m <grad l_m(x), grad l_m(i)>.

    TracInCP of Pruthi et al. 2020 (arXiv 2002.08484): each checkpoint stands for the steps of stochastic gradient
    descent near it, of which those on training example i have lowered the loss at target x by about
    eta_m <grad l(x), grad l(i)> each. Adaptive optimizers take other steps, for which it is a rougher guess. The
    paper's variant for the last layer alone is ``parameters=last_layer(model)``, see
    :func:`~lightning_trak.gradients.last_layer`; gradients of fewer parameters need a store of their own.

    Args:
        model: as for :class:`~lightning_trak.TRAK`.
        checkpoints: as for :class:`~lightning_trak.TRAK`.
        store: as for :class:`~lightning_trak.TRAK`, and may be one that another method has filled.
        learning_rates: eta_m: ``"snapshots"`` takes what :class:`~lightning_trak.TRAKCallback` noted with the
            checkpoints; other checkpoints need a number, or one for each.
        effect_on: as for :class:`GradientDot`.
        **options: as for :class:`GradientDot`.

    Raises:
        ValueError: if a snapshot's parameter groups had different learning rates and the selected parameters are not of
            one, since features do not keep parameters apart. Make a TracIn for each rate, whose ``parameters`` are
            those that had it and whose ``store`` is its own, and add the scores: the sum is TracIn's.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Checkpoints,
        store: str | Path,
        *,
        learning_rates: LearningRates = "snapshots",
        effect_on: EffectOn = "loss",
        **options: Unpack[FeatureOptions],
    ) -> None:
        super().__init__(model, checkpoints, store, learning_rates, effect_on, **options)


class GradientCosine(_GradientMethod):
    """Cosines of gradients, averaged over checkpoints: 1/M sum_m cos(grad l_m(x), grad l_m(i)).

    With ``learning_rates`` the sum is weighed by them, which is GAS (gradient aggregated similarity) of Hammoudeh and
    Lowd 2022 (arXiv 2201.10055), up to the batch size that it divides by. Examples that the model fits badly
    have large gradients, and a product favours them whatever the target; the cosine does not. A gradient of zero has
    scores of 0.

    Args:
        model: as for :class:`~lightning_trak.TRAK`.
        checkpoints: as for :class:`~lightning_trak.TRAK`.
        store: as for :class:`~lightning_trak.TRAK`, and may be one that another method has filled.
        learning_rates: None: checkpoints count alike; else as for :class:`TracIn`.
        effect_on: as for :class:`GradientDot`.
        **options: as for :class:`GradientDot`.
    """

    _scorer = GradientCosineScorer

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Checkpoints,
        store: str | Path,
        *,
        learning_rates: LearningRates | None = None,
        effect_on: EffectOn = "loss",
        **options: Unpack[FeatureOptions],
    ) -> None:
        super().__init__(model, checkpoints, store, learning_rates, effect_on, **options)
