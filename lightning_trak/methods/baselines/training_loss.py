"""The loss of each training example: the cheapest sign of a wrong label."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_trak.checkpoints.copies import copy_module, load_each
from lightning_trak.checkpoints.of_model import checkpoints_of
from lightning_trak.checkpoints.reading import CheckpointsLike
from lightning_trak.compatibility import original_module
from lightning_trak.methods.base import LabelStatistic
from lightning_trak.methods.examples import Examples
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import trained_output
from lightning_trak.running.data.sources import Data
from lightning_trak.running.trainers import trainer_of
from lightning_trak.texts.display import Displayed


class TrainingLoss(Displayed, LabelStatistic):
    """How badly does the model fit the training example, on average over checkpoints?

    A high loss is typical of a wrong label, as long as the model has not learned the label by heart. So snapshots from
    the course of training say more than the last one: the average over them is that of training dynamics (Pleiss et
    al. 2020, arXiv 2001.10528, of margins; Swayamdipta et al. 2020, arXiv 2009.10795, of probabilities). With models
    that were each trained on a part of the data, most losses are those of held-out examples.

    No gradients are needed: one forward pass over the training data at each checkpoint. The loss attributes nothing to
    training examples, so this is not a :class:`~lightning_trak.methods.Method`.

    Args:
        model: the trained model, which is never touched.
        checkpoints: as for :class:`~lightning_trak.TRAK`; losses are averaged over them.
        output: an output that determines the loss; default: the model's ``configure_model_output()``.
        weights_only: ``False`` lets ``.ckpt`` and ``.pt`` files run code when they are read; for files you trust only.

    Raises:
        TypeError: if the output does not determine the loss.
        ValueError: if the output depends on other training examples.
    """

    _shown = ("model", "checkpoints", "output")

    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        *,
        output: ModelOutput | None = None,
        weights_only: bool = True,
    ) -> None:
        self.model = original_module(model)
        self.output = trained_output(self.model, output)
        if self.output.context_size:
            raise ValueError(
                f"{type(self.output).__name__} depends on other training examples too; pass NegativeLoss with a loss of"
                " each example by output="
            )
        self.output.loss(torch.zeros(1))  # refuses before long work if the output does not determine the loss
        self.checkpoints = checkpoints_of(self.model, checkpoints, weights_only)

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """The loss of each training example in eval mode, averaged over checkpoints."""
        trainer = trainer_of(trainer)
        examples, module = Examples(train, "fit", trainer), copy_module(self.model)

        def losses(module: nn.Module, batch: Any) -> Tensor:
            return self.output.loss(self.output.output(module, batch))

        total = torch.zeros(len(examples), dtype=torch.float64)
        for checkpoint in load_each(module, self.checkpoints):
            total += examples.map(trainer, module, losses, f"the loss at {checkpoint.name}", self.model).double()
        return total / len(self.checkpoints)
