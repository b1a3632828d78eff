"""What TRAK with and without a projection share: a Newton step for each training example."""

from pathlib import Path
from typing import TypeVar

from torch import nn

from lightning_trak.checks import require_one_of
from lightning_trak.features.dtypes import Dtype
from lightning_trak.features.engines import EngineName
from lightning_trak.features.store import FeatureStore
from lightning_trak.gradients import ParameterSelection
from lightning_trak.methods.feature import FeatureMethod
from lightning_trak.methods.options import Checkpoints
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections import Projection
from lightning_trak.scoring.damping import Damping, require_damping
from lightning_trak.scoring.gram import Curvature
from lightning_trak.scoring.lag import Lag, require_lag
from lightning_trak.scoring.temperature import Temperature, Tempered, require_temperature, tempered
from lightning_trak.scoring.trak import LossGradients, TRAKScorer

AnyScorer = TypeVar("AnyScorer", bound=TRAKScorer)


class NewtonMethod(FeatureMethod):
    """Base of :class:`~lightning_trak.TRAK` and :class:`~lightning_trak.methods.ExactKernel`.

    The arguments are those of TRAK.
    """

    _shown = (*FeatureMethod._shown, "curvature", "damping", "loss_gradients", "temperature", "lag")

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Checkpoints | None = None,
        store: str | Path | None = None,
        *,
        output: ModelOutput | None = None,
        projection: Projection | None = None,
        curvature: Curvature = "gauss_newton",
        damping: Damping = "auto",
        loss_gradients: LossGradients = "per_checkpoint",
        soft_threshold: float = 0.0,
        temperature: Temperature | None = None,
        lag: Lag = "auto",
        parameters: ParameterSelection = None,
        engine: EngineName = "auto",
        seed: int = 0,
        dtype: Dtype | None = None,
        weights_only: bool = True,
        audit: int = 2,
    ) -> None:
        require_one_of("curvature", curvature, ("gauss_newton", "identity"))
        require_one_of("loss_gradients", loss_gradients, ("per_checkpoint", "averaged"))
        if not 0 <= soft_threshold < float("inf"):
            raise ValueError(f"soft_threshold must be at least 0, and finite, got {soft_threshold}")
        self.curvature: Curvature = curvature
        self.damping = require_damping(damping)
        self.loss_gradients: LossGradients = loss_gradients
        self.soft_threshold = soft_threshold
        self.temperature = require_temperature(temperature, loss_gradients)
        self.lag = require_lag(lag)
        super().__init__(
            model,
            checkpoints,
            store,
            output=output,
            projection=projection,
            parameters=parameters,
            engine=engine,
            seed=seed,
            dtype=dtype,
            weights_only=weights_only,
            audit=audit,
        )

    def _step(self) -> tuple[Curvature, Damping, LossGradients, float]:
        """The settings of the step."""
        return self.curvature, self.damping, self.loss_gradients, self.soft_threshold

    def _new_scorer(self, kind: type[AnyScorer], store: FeatureStore) -> AnyScorer:
        """A scorer with these settings."""
        subsets = [checkpoint.subset for checkpoint in self.checkpoints]
        return kind(store, *self._step(), subsets, self._tempered(), self.lag, self.output.averages)

    def _tempered(self) -> Tempered | None:
        """What gives Q in the place of the stored one."""
        return tempered(self.output, self.temperature, self.damping, self.loss_gradients)
