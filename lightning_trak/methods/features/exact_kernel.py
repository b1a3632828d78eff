"""TRAK without a projection, for training sets of up to tens of thousands of examples."""

from pathlib import Path

import lightning as L
import torch
from torch import nn
from typing_extensions import Unpack, override

from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.checks import require_one_of, require_options, shows_options_of
from lightning_trak.features.engines import EngineName
from lightning_trak.features.passes.options import Featurizing
from lightning_trak.features.passes.pipeline import FeaturePipeline
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.gradients import ParameterSelection
from lightning_trak.methods.features.newton import CurvatureChoice, NewtonMethod
from lightning_trak.methods.features.rescoring import ExactScores
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections.factors import GradientFactors
from lightning_trak.running.data.sources import Data
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import require_whole_parameters
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.damping import Damping, require_damping
from lightning_trak.scoring.newton.exact_kernel import ExactKernelScorer, stored_forms
from lightning_trak.scoring.newton.lag import Lag
from lightning_trak.scoring.newton.temperature import Temperature
from lightning_trak.scoring.newton.trak import LossGradients


class ExactKernel(NewtonMethod):
    """TRAK's question without a projection: by how much would the output change if the example counted once more?

    A positive score says that training on the example raises the output at the target, in the unit of the output, as
    for :class:`~lightning_trak.TRAK`. The scores are those of ``TRAK(projection=IdentityProjection())``, also for
    larger models. The formula is solved with the kernel: the inner products of the gradients of all
    pairs of training examples. They are computed layer by layer. For a linear layer on one position, the inner product
    of two gradients is that of the inputs times that of the output's gradients, so that gradients are never formed. For
    sequences and convolutions, the cheaper of two ways is taken by their shapes.

    The store holds each example's gradient exactly, in its shortest form (for a linear layer, its inputs and its
    output's gradients), and the kernel in blocks. For n training examples, the kernel of a checkpoint takes 4 n^2 bytes
    on disk, its factor 8 n^2 bytes of memory, and to make the factor takes 32 n^2 bytes (13 GB for n = 20,000). The
    kernel takes n^2 / 2 inner products in float64, each of T^2 (a + b) or a b products for a layer of a outputs and b
    inputs on T positions, and the stored gradients are read n / 2,000 times. If examples have several positions, all
    should have one length: the longest of a few decides what is stored, and a longer one is refused.

    Args:
        model: as for :class:`~lightning_trak.TRAK`.
        checkpoints: as for TRAK. Scores are averaged over them.
        store: directory of the gradients and the kernel, on a disk that all ranks see.
        output: the scalar output to attribute; default: the model's ``configure_model_output()``.
        curvature: as for TRAK. With ``"per_prediction"`` there are two gradients for each example, so that n is twice
            as large above.
        damping: lambda relative to the mean eigenvalue of K, whose size is the number of parameters; more than 0.
            ``"auto"`` follows the rule of TRAK.
        loss_gradients: as for TRAK.
        soft_threshold: as for TRAK.
        temperature: as for TRAK.
        lag: as for TRAK.
        parameters: which parameters to differentiate, by name pattern; default: all that require gradients.
        engine: how gradients are computed, as for TRAK. Hooks alone can give a shorter form than the gradient.
        seed: of the choice of audited examples.
        dtype: dtype of the stored numbers: float32 or float64.
        weights_only: as for TRAK.
        audit: as for TRAK: how many examples of each shard are differentiated again by plain autograd.

    Example::

        exact = ExactKernel(model, checkpoints="run/snapshots", store="run/kernel")
        exact.featurize(trainer, train_loader)
        scores = exact.score(trainer, target_loader)  # (num_targets, num_train)
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        store: str | Path | None = None,
        *,
        output: ModelOutput | None = None,
        curvature: CurvatureChoice = "auto",
        damping: Damping = "auto",
        loss_gradients: LossGradients = "per_checkpoint",
        soft_threshold: float = 0.0,
        temperature: Temperature | None = None,
        lag: Lag = "auto",
        parameters: ParameterSelection = None,
        engine: EngineName = "auto",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        weights_only: bool = True,
        audit: int = 2,
    ) -> None:
        require_one_of("dtype", dtype, (torch.float32, torch.float64))
        if require_damping(damping) == 0:
            raise ValueError("damping must be more than 0, or 'auto': without a projection the matrix K is singular")
        super().__init__(
            model,
            checkpoints,
            store,
            curvature=curvature,
            damping=damping,
            loss_gradients=loss_gradients,
            soft_threshold=soft_threshold,
            temperature=temperature,
            lag=lag,
            output=output,
            projection=GradientFactors(),
            parameters=parameters,
            engine=engine,
            seed=seed,
            dtype=dtype,
            weights_only=weights_only,
            audit=audit,
        )

    @override
    @shows_options_of(FeaturePipeline.featurize)
    def featurize(
        self,
        trainer: L.Trainer | None = None,
        data: Data | None = None,
        shard_size: int | None = None,
        **how: Unpack[Featurizing],
    ) -> None:
        """Store the gradients of the training set and their inner products. An interrupted call is continued.

        Args:
            trainer: a Trainer whose strategy keeps the whole model on each rank (one device, DDP). None: one on a
                single device.
            data: as for TRAK. Examples that have positions, such as tokens, must all have one length.
            shard_size: as for TRAK.
            **how: as for TRAK.

        Raises:
            ValueError: if the store was made with other settings, a gradient is not finite, an example has more
                positions than the first ones, or the strategy splits the model.
        """
        require_options(self.featurize, how, Featurizing)
        trainer = trainer_of(trainer)
        require_whole_parameters(trainer)
        super().featurize(trainer, data, shard_size, **how)
        store, ranks = self._open(trainer), Ranks.of(trainer)
        complete = store.complete and (self.curvature != "per_prediction" or self._open_curved().complete)
        if how.get("part") is None or ranks.all_true(complete):  # else the last part makes the kernels
            self.make_scorer(store).make_kernels(trainer.strategy.root_device, ranks)

    @property
    @override
    def _fitted(self) -> bool:
        return False  # forms of gradients depend on their shapes alone

    @override
    def _require_trainer(self, trainer: L.Trainer) -> None:
        require_whole_parameters(trainer)

    @override
    def _exact_scores(self) -> ExactScores:
        raise ValueError("the scores of ExactKernel are exact already: leave rescore= out")

    @override
    def target_features(self, trainer: L.Trainer | None = None, data: Data | None = None) -> list[Features]:
        """The whole gradients of targets, see :meth:`FeatureMethod.target_features`."""
        trainer = trainer_of(trainer)
        require_whole_parameters(trainer)
        store = self._open(trainer)
        found = super().target_features(trainer, data)
        return [
            rows._replace(features=stored_forms(store, checkpoint).gradients(rows.features))
            for checkpoint, rows in enumerate(found)
        ]

    @override
    def make_scorer(self, store: FeatureStore) -> ExactKernelScorer:
        return self._new_scorer(ExactKernelScorer, store, self._curved(store))
