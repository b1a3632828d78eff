"""What influence methods share: preconditioned target gradients, multiplied by streamed training gradients."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import TypedDict

import lightning as L
import torch
from torch import Tensor, nn

from lightning_trak.checkpoints.reading import CheckpointsLike, masks_of, resolve_checkpoints
from lightning_trak.compatibility import original_module
from lightning_trak.features.identity import Contents
from lightning_trak.features.model import ModelCopy
from lightning_trak.gradients import ParameterSelection
from lightning_trak.methods.base import Method
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.influence.audit import audit
from lightning_trak.methods.influence.passes import Passes, without_gradients
from lightning_trak.methods.influence.products import gradient_products
from lightning_trak.methods.influence.solvers import InverseProduct
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import target_output, trained_output
from lightning_trak.running.data import Data
from lightning_trak.running.strategies import require_whole_parameters

# Gradients of this many bytes are preconditioned at a time; solvers hold a few copies.
TARGET_BYTES = 1 << 29


class InfluenceOptions(TypedDict, total=False):
    """Keyword arguments of every influence method, see :class:`Influence`."""

    output: ModelOutput | None
    parameters: ParameterSelection
    seed: int
    weights_only: bool


class Influence(Method):
    """Base of influence methods: tau(x)_i = g(x)^T (H + lambda I)^-1 g_i Q_i (Koh and Liang 2017, arXiv 1703.04730).

    g is the gradient of the output, without projection, and H is a curvature matrix of the *sum* of the training
    losses. Scores are averaged over checkpoints. Each process computes all of them.

    Args:
        model: as for :class:`~lightning_trak.TRAK`; it is not touched.
        checkpoints: as for :class:`~lightning_trak.TRAK`.
        output: the scalar output to attribute; default: the model's ``configure_model_output()``.
        parameters: which parameters to differentiate, by name pattern; default: all that require gradients.
        seed: of what is drawn at random.
        weights_only: ``False`` lets ``.ckpt`` and ``.pt`` files run code when they are read; for files you trust only.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike,
        *,
        output: ModelOutput | None = None,
        parameters: ParameterSelection = None,
        seed: int = 0,
        weights_only: bool = True,
    ) -> None:
        self.model = original_module(model)
        self.output = trained_output(self.model, output)
        self.checkpoints = resolve_checkpoints(checkpoints, weights_only=weights_only)
        if masks_of(self.checkpoints) is not None:
            raise ValueError(
                f"{type(self).__name__} takes the curvature from all training examples, but the models of some"
                " checkpoints have seen a part of them: use TRAK, which takes it from the examples that each has seen,"
                " or checkpoints of models that were trained on all data"
            )
        self.parameters = parameters
        self.seed = seed

    @abstractmethod
    def _prepare(self, passes: Passes) -> InverseProduct:
        """Do what a checkpoint needs before the targets come."""

    def _agreement(self, passes: Passes) -> float:  # noqa: ARG002
        """How far the checkpoints agree, for the damping, if the method needs it."""
        return 1.0

    def _selection(self) -> ParameterSelection:
        return self.parameters

    def attribute(self, trainer: L.Trainer, train: Data, targets: Data, output: ModelOutput | None = None) -> Tensor:
        """Score every target against every training example.

        Args:
            trainer: any Trainer whose strategy keeps the model whole. Its device is used. ``precision="64-true"``
                computes everything in float64, any other precision in float32 (float64 where weights are): the inverse
                of a Hessian would drown in the rounding of half precision, mixed or true.
            train: the training data, without random augmentation. They are loaded several times.
            targets: the targets.
            output: of the targets, if it is another one than that of the training examples.

        Returns:
            On the CPU, shape ``(num_targets, num_train)``, in float32 or float64. A positive score says that training
            on the example raises the output at the target, in the unit of the output.

        Raises:
            ValueError: if a gradient is not finite, the inverse cannot be applied (see the solvers), or the output
                depends on other weights than those of the model's copy, on the rest of the batch or on chance. Outputs
                and gradients of two training examples and two targets, drawn by the seed at each checkpoint, are
                compared with those of each alone by autograd.
        """
        require_whole_parameters(trainer)
        asked = target_output(output, self.output)
        train_set, target_set = Examples(train, "fit", trainer), Examples(targets, "predict", trainer)
        with without_gradients():
            digests = Contents(self.checkpoints).digests
            model = ModelCopy(self.model, self.output, self.checkpoints, digests, self._selection())
            passes = Passes(model, self.seed, trainer, train_set)
            passes.agreement = self._agreement(passes)
            scores = torch.zeros(len(target_set), len(train_set), dtype=passes.dtype)
            for checkpoint in range(len(self.checkpoints)):
                passes.enter(checkpoint)
                audit(passes, train_set)
                with passes.asking(asked):
                    audit(passes, target_set)
                self._add(scores, passes, target_set, asked)
        return scores / len(self.checkpoints)

    def _add(self, scores: Tensor, passes: Passes, targets: Examples, output: ModelOutput | None) -> None:
        """Add the scores at the current checkpoint."""
        inverse = self._prepare(passes)
        for span in target_blocks(passes, targets):
            with passes.asking(output):
                gradients = torch.cat([rows.features for _, rows in passes.rows(targets, span)])
            directions = inverse(gradients, span)
            for part, rows in gradient_products(passes, directions):
                products = (rows.features * rows.loss_gradients.unsqueeze(1)).T
                scores[span.start : span.stop, part[0] : part[-1] + 1] += products.cpu()


def target_blocks(passes: Passes, targets: Examples) -> Iterator[range]:
    """The positions of targets, as many at a time as fit in memory."""
    block = max(1, TARGET_BYTES // (passes.size * passes.dtype.itemsize))
    return (range(start, min(start + block, len(targets))) for start in range(0, len(targets), block))
