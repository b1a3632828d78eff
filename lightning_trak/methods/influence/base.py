"""What influence methods share: preconditioned target gradients, multiplied by streamed training gradients."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import TypedDict

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_trak.checkpoints.of_model import checkpoints_of
from lightning_trak.checkpoints.reading import CheckpointsLike, masks_of
from lightning_trak.checks import integer
from lightning_trak.compatibility import original_module
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.rows import Features
from lightning_trak.features.store.identity import Contents
from lightning_trak.gradients import ParameterSelection
from lightning_trak.methods.base import DataMethod
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.influence.audit import audit
from lightning_trak.methods.influence.passes import Passes, without_gradients
from lightning_trak.methods.influence.products import gradient_products
from lightning_trak.methods.influence.solvers import InverseProduct
from lightning_trak.methods.predictions import with_predictions
from lightning_trak.methods.questions import Asked
from lightning_trak.methods.showing import RAISES_OUTPUT
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import target_output, trained_output
from lightning_trak.running.data.sources import Data
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import require_whole_parameters
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.groups import Collected, RowBlock, Sums, row_blocks

# Gradients of this many bytes are preconditioned at a time; solvers hold a few copies.
TARGET_BYTES = 1 << 29


class InfluenceOptions(TypedDict, total=False):
    """Keyword arguments of every influence method, see :class:`Influence`."""

    output: ModelOutput | None
    parameters: ParameterSelection
    seed: int
    weights_only: bool


class Influence(DataMethod):
    """Base of influence methods: tau(x)_i = g(x)^T (H + lambda I)^-1 g_i Q_i (Koh and Liang 2017, arXiv 1703.04730).

    g is the gradient of the output, without projection, and H is a curvature matrix of the *sum* of the training
    losses. Scores are averaged over checkpoints. Each process computes all of them; all must call, because they compare
    their models first.

    Args:
        model: as for :class:`~lightning_trak.TRAK`; it is not touched.
        checkpoints: as for :class:`~lightning_trak.TRAK`.
        output: the scalar output to attribute; default: the model's ``configure_model_output()``.
        parameters: which parameters to differentiate, by name pattern; default: all that require gradients.
        seed: of what is drawn at random.
        weights_only: ``False`` lets ``.ckpt`` and ``.pt`` files run code when they are read; for files you trust only.
    """

    _shown = ("model", "checkpoints", "output", "curvature", "damping", "solver")
    _without_candidates = None

    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        *,
        output: ModelOutput | None = None,
        parameters: ParameterSelection = None,
        seed: int = 0,
        weights_only: bool = True,
    ) -> None:
        self.model = original_module(model)
        self.output = trained_output(self.model, output)
        self.checkpoints = checkpoints_of(self.model, checkpoints, weights_only)
        if masks_of(self.checkpoints) is not None:
            raise ValueError(
                f"{type(self).__name__} takes the curvature from all training examples, but the models of some"
                " checkpoints have seen a part of them: use TRAK, which takes it from the examples that each has seen,"
                " or checkpoints of models that were trained on all data"
            )
        self.parameters = parameters
        self.seed = integer("seed", seed)

    @property
    @override
    def meaning(self) -> str:
        return RAISES_OUTPUT

    @override
    def _model_copy(self, parameters: ParameterSelection = None) -> ModelCopy:
        digests = [content.digest for content in Contents(self.checkpoints).read()]
        return ModelCopy(self.model, self.output, self.checkpoints, digests, parameters)

    @abstractmethod
    def _prepare(self, passes: Passes) -> InverseProduct:
        """Do what a checkpoint needs before the targets come."""

    def _noise_level(self, passes: Passes) -> float:
        """What the automatic damping is multiplied by because there are several checkpoints, if the method needs it."""
        return 1.0

    def _selection(self) -> ParameterSelection:
        return self.parameters

    def _target_output(self, output: ModelOutput | None) -> ModelOutput | None:
        return target_output(output, self.output)

    def _scores(self, trainer: L.Trainer, train: Examples, targets: Examples, asked: Asked) -> Tensor:
        """Products of gradients with the inverse, averaged over checkpoints.

        A target's gradient is added to those of its group before the inverse is applied.

        Args:
            trainer: any Trainer whose strategy keeps the model whole; None: one on a single device. Its device is used.
                ``precision="64-true"`` computes everything in float64, any other precision in float32 (float64 where
                weights are): the inverse of a Hessian would drown in the rounding of half precision, mixed or true.
            train: the training data, without random augmentation. They are loaded several times.
            targets: the targets.
            asked: the question.

        Returns:
            In float32 or float64. A positive score says that training on the example raises the output at the target,
            in the unit of the output.

        Raises:
            ValueError: if a gradient is not finite, the inverse cannot be applied (see the solvers), ranks have models
                with other weights, or the output depends on other weights than those of the model's copy, on the rest
                of the batch or on chance. Outputs and gradients of two examples of each dataset, drawn by the seed at
                each checkpoint, are compared with those of each alone by autograd.
        """
        require_whole_parameters(trainer)
        scored = train if asked.candidates is None else asked.candidates
        targets = with_predictions(trainer, targets, self._model_copy, asked.output)
        with without_gradients():
            passes = self._passes(trainer, train)
            found = Collected(asked.num_rows(len(targets)), len(scored), asked.columns, passes.dtype)
            for checkpoint in range(len(self.checkpoints)):
                passes.enter(checkpoint)
                for examples in [train] if scored is train else [train, scored]:
                    audit(passes, examples)
                with passes.asking(asked.output):
                    audit(passes, targets)
                inverse = self._prepare(passes)
                for block in target_blocks(passes, targets, asked.rows):
                    directions = inverse(target_gradients(passes, targets, block, asked.output), block.span)
                    for part, rows in gradient_products(passes, directions, examples=scored):
                        found.add(block.span, part, (rows.features * rows.loss_gradients.unsqueeze(1)).T)
        return found.scores() / len(self.checkpoints)

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """The loss at each example, had the model not been trained on it, see :meth:`LabelStatistic.label_suspicion`.

        The inverse is applied to the gradient of every training example: once to all for EK-FAC and ``Explicit``, but
        by as many iterations as for a target for the other solvers.

        Raises:
            TypeError: if the output does not determine the loss.
        """
        self.output.loss(torch.zeros(1))  # refuses before long work
        trainer = trainer_of(trainer)
        require_whole_parameters(trainer)
        examples = Examples(train, "fit", trainer)
        with without_gradients():
            passes = self._passes(trainer, examples)
            outputs = torch.zeros(len(examples), dtype=passes.dtype)  # without the example itself
            for checkpoint in range(len(self.checkpoints)):
                passes.enter(checkpoint)
                audit(passes, examples)
                inverse = self._prepare(passes)
                for block in target_blocks(passes, examples):
                    rows = Features.cat([rows for _, rows in passes.rows(examples, block.members)])
                    added = (inverse(rows.features, block.span) * rows.features).sum(1) * rows.loss_gradients
                    outputs[block.members] += (rows.outputs - added).cpu()
        return self.output.loss(outputs / len(self.checkpoints))

    def _passes(self, trainer: L.Trainer, train: Examples) -> Passes:
        model = self._model_copy(self._selection())
        Ranks.of(trainer).require_same_weights(model.streams)
        passes = Passes(model, self.seed, trainer, train)
        passes.noise_level = self._noise_level(passes)
        return passes


def target_blocks(passes: Passes, targets: Examples, rows: Sums | None = None) -> Iterator[RowBlock]:
    """Rows of scores, as many at a time as have gradients that fit in memory."""
    return row_blocks(rows, len(targets), max(1, TARGET_BYTES // (passes.size * passes.dtype.itemsize)))


def target_gradients(passes: Passes, targets: Examples, block: RowBlock, output: ModelOutput | None) -> Tensor:
    """The gradients of some rows, each the sum of those of its targets, ``(len(block.span), p)``."""
    with passes.asking(output):
        return block.total(rows.features for _, rows in passes.rows(targets, block.members))
