"""What the methods share that learn from models retrained on subsets of the training data."""

from abc import abstractmethod

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from lightning_trak.checks import require_tensor
from lightning_trak.methods.base import MatrixMethod
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.showing import RAISES_OUTPUT
from lightning_trak.running.data.sources import Data
from lightning_trak.running.trainers import trainer_of


class SubsetMethod(MatrixMethod):
    """Base of the methods that compare outputs of models that were and were not trained on an example.

    Args:
        masks: bool ``(num_subsets, num_train)``, true where the subset holds the example.
        outputs: ``(num_targets, num_subsets)``, the output at each target of a model trained on each subset, or
            ``(num_targets, num_subsets, num_seeds)``, which are averaged over seeds.

    Raises:
        ValueError: if shapes or dtypes do not fit, or an output is not finite.
    """

    _shown = ("masks", "outputs")
    _without_output = "outputs= holds the outputs that are attributed"

    def __init__(self, masks: Tensor, outputs: Tensor) -> None:
        require_tensor("masks", masks)
        require_tensor("outputs", outputs)
        if masks.dtype != torch.bool or masks.ndim != 2:
            raise ValueError(
                f"expected masks as bool (num_subsets, num_train), got {masks.dtype} {tuple(masks.shape)}; turn zeros"
                " and ones into booleans with .bool()"
            )
        if outputs.ndim not in (2, 3) or outputs.shape[1] != len(masks) or 0 in outputs.shape:
            raise ValueError(
                f"expected outputs of shape (num_targets, {len(masks)}) or (num_targets, {len(masks)}, num_seeds), for"
                f" {len(masks)} subsets, got {tuple(outputs.shape)}"
            )
        finite = outputs.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(
                f"outputs of target {int((~finite).nonzero()[0])} are not finite; leave it out, or retrain"
            )
        self.masks = masks.cpu()
        self.outputs = outputs.detach().cpu().double()
        if outputs.ndim == 3:
            self.outputs = self.outputs.mean(2)

    @property
    @override
    def meaning(self) -> str:
        return RAISES_OUTPUT

    @property
    @override
    def used_masks(self) -> Tensor:
        return self.masks

    def matrix(self, trainer: L.Trainer, train: Examples, targets: Examples) -> Tensor:
        """Estimates from the masks and outputs; of the data, only the sizes are used.

        See :class:`~lightning_trak.methods.base.MatrixMethod`.

        Raises:
            ValueError: if the sizes of the data differ from those of the masks and outputs.
        """
        self._require_training_set(train)
        num_targets = len(targets)
        if num_targets != len(self.outputs):
            raise ValueError(
                f"the outputs have {len(self.outputs)} targets, the data have {num_targets}; pass the targets of the"
                " outputs, in their order"
            )
        return self.estimate()

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """The size of each example's score at itself, for outputs of the training examples as the targets.

        With :class:`~lightning_trak.methods.EmpiricalInfluence` it is the memorization of Feldman and Zhang 2020 (arXiv
        2008.03703).

        Raises:
            ValueError: if the number of training examples is not that of the masks, or of the targets.
        """
        trainer = trainer_of(trainer)
        self._require_training_set(Examples(train, "fit", trainer))
        if len(self.outputs) != self.masks.shape[1]:
            raise ValueError(
                f"wrong labels are found by the outputs at the {self.masks.shape[1]} training examples, in their"
                f" order; the outputs given are those of {len(self.outputs)} targets"
            )
        return self.estimate().diagonal().abs()

    def _require_training_set(self, train: Examples) -> None:
        if len(train) != self.masks.shape[1]:
            raise ValueError(
                f"the masks have {self.masks.shape[1]} training examples, the data have {len(train)}; pass the training"
                " set that the masks are of"
            )

    @abstractmethod
    def estimate(self) -> Tensor:
        """The scores, ``(num_targets, num_train)``."""
