"""Products and cosines of gradients, averaged over checkpoints or weighed by learning rates."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import require_one_of, require_options, shows_options_of
from lightning_trak.features.store import FeatureStore
from lightning_trak.gradients import select_parameters
from lightning_trak.methods.features.base import FeatureMethod, FeatureOptions
from lightning_trak.methods.features.learning_rates import LearningRates, resolve_learning_rates
from lightning_trak.methods.showing import LOWERS_LOSS, RAISES_OUTPUT
from lightning_trak.running.data.sources import Data
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.gradient import EffectOn, GradientCosineScorer, GradientDotScorer
from lightning_trak.scoring.topk import TopK

_NEIGHBOURS = 10


class _GradientMethod(FeatureMethod):
    """Compares gradients, with a weight for each checkpoint; the arguments are those of its subclasses."""

    _shown = (*FeatureMethod._shown, "effect_on")

    _scorer: type[GradientDotScorer] = GradientDotScorer

    @shows_options_of(FeatureMethod.__init__)
    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        store: str | Path | None = None,
        *,
        learning_rates: LearningRates | None = None,
        effect_on: EffectOn = "loss",
        preconditioned: bool = False,
        **options: Unpack[FeatureOptions],
    ) -> None:
        require_options(type(self), options, FeatureOptions)
        require_one_of("effect_on", effect_on, ("loss", "output"))
        super().__init__(model, checkpoints, store, **options)
        if preconditioned:
            for checkpoint in self.checkpoints:
                checkpoint.kept_preconditioner()  # raises if it was not kept
            self.settings = replace(self.settings, preconditioned=True)
        if learning_rates is not None and self.used_masks is not None:
            raise ValueError(
                f"{type(self).__name__} adds up steps of training on an example, but the models of some checkpoints"
                " have not seen all examples: use TRAK, or GradientDot, which asks about a step that could be taken"
            )
        count = len(self.checkpoints)
        self.effect_on: EffectOn = effect_on
        self.checkpoint_weights = (
            [1 / count] * count
            if learning_rates is None
            else resolve_learning_rates(
                learning_rates, self.checkpoints, lambda: select_parameters(self.model, self.parameters)
            )
        )

    @property
    @override
    def meaning(self) -> str:
        return LOWERS_LOSS if self.effect_on == "loss" else RAISES_OUTPUT

    @override
    def self_influence(self, trainer: L.Trainer | None = None) -> Tensor:
        self._require_plain_gradients()
        return super().self_influence(trainer)

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        self._require_plain_gradients()  # before the store is made
        return super().label_suspicion(trainer, train)

    def _require_plain_gradients(self) -> None:
        if self.settings.preconditioned:
            raise ValueError(
                "the store has preconditioned gradients, and self-influence also needs them as they are: score the"
                " training data as targets, or use preconditioned=False"
            )

    def make_scorer(self, store: FeatureStore) -> GradientDotScorer:
        """Products or cosines of gradients."""
        return self._scorer(store, self.checkpoint_weights, self.effect_on)


class GradientDot(_GradientMethod):
    r"""By how much would a small step of gradient descent on the training example lower the loss at the target?

    A positive score says that training on the example lowers the loss at the target. The unit is that of the loss, for
    a learning rate of 1: a step of a small size lowers the loss by the size times the score (Charpiat et al. 2019,
    "Input similarity from the neural network perspective"). A score is the product of gradients, averaged over
    checkpoints: 1/M sum_m <grad l_m(x), grad l_m(i)>. With ``effect_on="output"`` a positive score says that training
    on the example raises the output at the target, as TRAK's does, and the unit is that of the output.

    Args:
        model: as for :class:`~lightning_trak.TRAK`.
        checkpoints: as for :class:`~lightning_trak.TRAK`.
        store: as for :class:`~lightning_trak.TRAK`, and may be one that another method has filled.
        effect_on: what scores are about: ``"loss"``, by how much it falls; or ``"output"``, by how much it rises: then
            the gradient of the output at the target takes the place of minus that of its loss. The two differ in more
            than scale where the loss can rise with the output: if a prediction is too high, what lowers the output
            lowers the loss.
        preconditioned: whether the step is Adam's: the gradient of the training example, and not that of the target, is
            multiplied by :math:`1 / (\sqrt{\hat v} + \epsilon)`, made of the second moments of the snapshot. The
            snapshots need ``TRAKCallback(..., preconditioner=True)``, and the features a store of their own.
        **options: ``output``, ``projection``, ``parameters``, ``engine``, ``seed``, ``dtype``, ``weights_only`` and
            ``audit``, as for :class:`~lightning_trak.TRAK`. With
            :class:`~lightning_trak.projections.IdentityProjection` the products are exact, with others estimates.
    """

    @shows_options_of(_GradientMethod.__init__)
    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        store: str | Path | None = None,
        *,
        effect_on: EffectOn = "loss",
        preconditioned: bool = False,
        **options: Unpack[FeatureOptions],
    ) -> None:
        super().__init__(model, checkpoints, store, effect_on=effect_on, preconditioned=preconditioned, **options)


class TracIn(_GradientMethod):
    """TracIn: by how much have the steps of training on the training example lowered the loss at the target?

    A positive score says that training on the example has lowered the loss at the target. The unit is that of the loss:
    a score is the fall from one step on the example at each checkpoint, added up over checkpoints (TracInCP of Pruthi
    et al. 2020, arXiv 2002.08484): sum_m eta_m <grad l_m(x), grad l_m(i)>, with eta_m the learning rate. TRAK asks
    about the output instead; with ``effect_on="output"`` TracIn does so too: a positive score then says that training
    on the example has raised the output.

    Each checkpoint stands for the steps of stochastic gradient descent near it. Adaptive optimizers take other steps,
    for which it is a rougher guess; with ``preconditioned=True`` the steps are Adam's. The paper's variant for the last
    layer alone is ``parameters=last_layer(model)``, see :func:`~lightning_trak.gradients.last_layer`; gradients of
    fewer parameters need a store of their own.

    Args:
        model: as for :class:`~lightning_trak.TRAK`.
        checkpoints: as for :class:`~lightning_trak.TRAK`.
        store: as for :class:`~lightning_trak.TRAK`, and may be one that another method has filled.
        learning_rates: eta_m: ``"snapshots"`` takes those that :class:`~lightning_trak.TRAKCallback` recorded with the
            checkpoints; other checkpoints need a number, or one for each.
        effect_on: as for :class:`GradientDot`.
        preconditioned: as for :class:`GradientDot`.
        **options: as for :class:`GradientDot`.

    Raises:
        ValueError: if the selected parameters had different learning rates at a snapshot, since features do not keep
            parameters apart. Then make one TracIn for each rate, with the ``parameters`` that had it and a ``store`` of
            its own, and add the scores: the sum is TracIn's.
    """

    @shows_options_of(_GradientMethod.__init__)
    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        store: str | Path | None = None,
        *,
        learning_rates: LearningRates = "snapshots",
        effect_on: EffectOn = "loss",
        preconditioned: bool = False,
        **options: Unpack[FeatureOptions],
    ) -> None:
        super().__init__(
            model,
            checkpoints,
            store,
            learning_rates=learning_rates,
            effect_on=effect_on,
            preconditioned=preconditioned,
            **options,
        )


class GradientCosine(_GradientMethod):
    """How alike are the directions in which the training example and the target move the parameters?

    A positive score says that training on the example lowers the loss at the target; with ``effect_on="output"``, that
    it raises the output. There is no unit: a score is the cosine of the two gradients, from -1 to 1, averaged over
    checkpoints, and does not say by how much: 1/M sum_m cos(grad l_m(x), grad l_m(i)). A gradient of zero has scores of
    0.

    Examples that the model fits badly have large gradients, and a product favours them whatever the target; the cosine
    does not. With ``learning_rates`` the sum is weighed by them, which is GAS (gradient aggregated similarity) of
    Hammoudeh and Lowd 2022 (arXiv 2201.10055), up to the batch size that it divides by. With ``preconditioned=True``,
    too, it is the score by which LESS selects data (Xia et al. 2024, arXiv 2402.04333, definition 3.1), up to two terms
    of Adam's update that this leaves out: the momentum, which is the same for all training examples, and the example's
    own share of the second moment. :doc:`/guides/hugging_face` has the recipe.

    Args:
        model: as for :class:`~lightning_trak.TRAK`.
        checkpoints: as for :class:`~lightning_trak.TRAK`.
        store: as for :class:`~lightning_trak.TRAK`, and may be one that another method has filled.
        learning_rates: None: checkpoints count alike; else as for :class:`TracIn`.
        effect_on: as for :class:`GradientDot`.
        preconditioned: as for :class:`GradientDot`.
        **options: as for :class:`GradientDot`.
    """

    _scorer = GradientCosineScorer

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """Minus the mean score of the ten other examples with the highest scores for the example.

        If it is high, no other example moves the parameters in the same direction. The score of an example at itself
        says nothing here, because it is the same for all. Training examples are compared by their stored gradients.
        Those that were left out are the least suspicious.

        Raises:
            ValueError: if there is only one training example; and as :meth:`score`.
        """
        trainer = trainer_of(trainer)
        self.featurize(trainer, train)
        store, ranks = self.open_store(trainer), Ranks.of(trainer)
        num_others = store.num_examples - len(store.skipped) - 1
        if num_others < 1:
            raise ValueError("there is only one training example, and nothing to compare it with")
        scorer = self._scorer(store, self.checkpoint_weights, "loss")
        scorer.fit(trainer.strategy.root_device, ranks)
        suspicion = []
        for shard in range(store.num_shards):
            rows = [store.read(checkpoint, shard) for checkpoint in range(store.num_checkpoints)]
            directions = [scorer.directions(checkpoint, part) for checkpoint, part in enumerate(rows)]
            best = cast(TopK, scorer.score(directions, _NEIGHBOURS + 1, True, ranks))
            itself = best.indices == torch.tensor(store.shard(shard)).unsqueeze(1)
            others = best.values.masked_fill(itself, -torch.inf)
            suspicion.append(-others.topk(min(_NEIGHBOURS, num_others), dim=1).values.mean(1))
        found = torch.cat(suspicion)
        found[store.skipped] = found.min()
        return found
