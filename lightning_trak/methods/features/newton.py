"""What TRAK with and without a projection share: a Newton step for each training example."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar, cast

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import Unpack, override

from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import number_or_auto, real, require_one_of, require_options, shows_options_of
from lightning_trak.features.passes.pipeline import FeaturePipeline
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods.features.base import FeatureMethod, FeatureOptions
from lightning_trak.methods.showing import RAISES_OUTPUT
from lightning_trak.outputs.predictions import SeveralPredictions
from lightning_trak.running.data.sources import Data
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import refuse_spawning
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.damping import Damping, require_damping
from lightning_trak.scoring.newton.gram import Curvature
from lightning_trak.scoring.newton.lag import Lag
from lightning_trak.scoring.newton.per_prediction import PredictionCurvature
from lightning_trak.scoring.newton.temperature import Temperature, Tempered, require_temperature, tempered
from lightning_trak.scoring.newton.trak import LossGradients, TRAKScorer

AnyScorer = TypeVar("AnyScorer", bound=TRAKScorer)
CurvatureChoice = Curvature | Literal["per_prediction", "auto"]


class NewtonMethod(FeatureMethod):
    """Base of :class:`~lightning_trak.TRAK` and :class:`~lightning_trak.methods.ExactKernel`.

    The arguments are those of TRAK.
    """

    _shown = (*FeatureMethod._shown, "curvature", "damping", "loss_gradients", "temperature", "lag")

    @shows_options_of(FeatureMethod.__init__)
    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        store: str | Path | None = None,
        *,
        curvature: CurvatureChoice = "auto",
        damping: Damping = "auto",
        loss_gradients: LossGradients = "per_checkpoint",
        soft_threshold: float = 0.0,
        temperature: Temperature | None = None,
        lag: Lag = "auto",
        **options: Unpack[FeatureOptions],
    ) -> None:
        require_options(type(self), options, FeatureOptions)
        require_one_of("curvature", curvature, ("gauss_newton", "identity", "per_prediction", "auto"))
        require_one_of("loss_gradients", loss_gradients, ("per_checkpoint", "averaged"))
        if not 0 <= real("soft_threshold", soft_threshold) < float("inf"):
            raise ValueError(f"soft_threshold must be at least 0, and finite, got {soft_threshold}")
        self.damping = require_damping(damping)
        self.loss_gradients: LossGradients = loss_gradients
        self.soft_threshold = soft_threshold
        self.temperature = require_temperature(temperature, loss_gradients)
        self.lag = number_or_auto("lag", lag, 1)
        super().__init__(model, checkpoints, store, **options)
        self.curvature = self._chosen(curvature)

    @property
    @override
    def meaning(self) -> str:
        return RAISES_OUTPUT

    def _chosen(self, curvature: CurvatureChoice) -> Curvature | Literal["per_prediction"]:
        """The curvature, if it is possible here.

        Raises:
            ValueError: if it is not.
        """
        several = isinstance(self.output, SeveralPredictions)
        if curvature == "auto":
            return "per_prediction" if several and not self._fitted else "gauss_newton"
        if curvature == "per_prediction" and not several:
            raise ValueError(
                'curvature="per_prediction" needs an output of several predictions, such as CausalLMMargin,'
                f" SegmentationMargin or MultiLabelMargin, and {type(self.output).__name__} is none: use"
                ' curvature="gauss_newton"'
            )
        if curvature == "per_prediction" and self._fitted:
            raise ValueError(
                'curvature="per_prediction" needs a projection that is not fitted to gradients, and'
                f' {type(self.settings.projection).__name__} is: use SparseProjection, or curvature="gauss_newton"'
            )
        return curvature

    @property
    def _fitted(self) -> bool:
        """Whether the projection is fitted to gradients, which are not those of single predictions."""
        return self.settings.projection.sample_size > 0

    @override
    def _pipelines(self) -> Iterator[FeaturePipeline]:
        yield from super()._pipelines()
        if self.curvature == "per_prediction":
            rank_zero_info(f"{type(self).__name__}: now the curvature of single predictions, a row for each example")
            yield self._curvature_pipeline()

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """The loss at each example, had the model not been trained on it; see :meth:`LabelStatistic.label_suspicion`.

        It is taken at temperature and lag 1: the question is what this model makes of a label, not another one. Those
        that were left out are the least suspicious.

        Raises:
            TypeError: if the output does not determine the loss.
        """
        self.output.loss(torch.zeros(1))  # refuses before long work
        trainer = trainer_of(trainer)
        self.featurize(trainer, train)
        refuse_spawning(trainer)
        of_this_model = copy.copy(self)
        of_this_model.temperature = of_this_model.lag = 1.0
        of_this_model.loss_gradients = "per_checkpoint"
        store, ranks = self.open_store(trainer), Ranks.of(trainer)
        scorer = cast(TRAKScorer, of_this_model.make_scorer(store))
        scorer.fit(trainer.strategy.root_device, ranks)
        losses = self.output.loss(scorer.outputs_without_itself(ranks))
        if scorer.skipped is not None:
            losses[scorer.skipped] = losses[~scorer.skipped].min()
        return losses

    def _step(self) -> tuple[Curvature, Damping, LossGradients, float]:
        """The settings of the step. The rows of single predictions have R = 1."""
        curvature: Curvature = "gauss_newton" if self.curvature == "per_prediction" else self.curvature
        return curvature, self.damping, self.loss_gradients, self.soft_threshold

    def _curvature_pipeline(self) -> FeaturePipeline:
        """What makes the rows of single predictions."""
        return self._pipeline_of(self._prediction_curvature(), self.store / "curvature")

    def _prediction_curvature(self) -> PredictionCurvature:
        """The output whose gradients are the rows of single predictions."""
        return PredictionCurvature(cast(SeveralPredictions, self.output), self.settings.seed)

    def _open_curved(self) -> FeatureStore:
        """The store of the rows of single predictions, which may be incomplete.

        Raises:
            FileNotFoundError: if there is none.
        """
        pipeline = self._curvature_pipeline()
        try:
            return pipeline.open(pipeline.copy_model())
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f'store "{self.store}" has no curvature of single predictions yet: call featurize again, or use'
                ' curvature="gauss_newton"'
            ) from error

    def _curved(self, store: FeatureStore) -> FeatureStore | None:
        """The complete store of the rows of single predictions; None if K is made of the given store alone.

        Raises:
            FileNotFoundError: if there is none.
            RuntimeError: if it is incomplete.
        """
        if self.curvature != "per_prediction":
            return None
        curved = self._open_curved()
        curved.require_complete()
        if curved.num_examples != store.num_examples:
            raise RuntimeError(
                f'store "{store.directory}" has {store.num_examples} examples, and the curvature of single predictions'
                f" is of {curved.num_examples}: call featurize again"
            )
        return curved

    def _new_scorer(self, kind: type[AnyScorer], store: FeatureStore, curved: FeatureStore | None = None) -> AnyScorer:
        """A scorer with these settings."""
        subsets = [checkpoint.subset for checkpoint in self.checkpoints]
        return kind(store, *self._step(), subsets, self._tempered(), self.lag, self.output.averages, curved)

    def _tempered(self) -> Tempered | None:
        """What gives Q in the place of the stored one."""
        return tempered(self.output, self.temperature, self.damping, self.loss_gradients)
