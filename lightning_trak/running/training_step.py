"""A module's ``training_step``, called without a Trainer."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

NO_TRAINER_WARNING = ".*`self.trainer` reference is not registered.*"  # a warning of self.log


def training_step(module: L.LightningModule, batch: Any, batch_idx: int = 0) -> Tensor | None:
    """Call ``training_step`` without a Trainer.

    If the step calls ``self.log``, Lightning warns that there is no Trainer: filter :data:`NO_TRAINER_WARNING`.

    Args:
        module: the module.
        batch: a batch on the module's device.
        batch_idx: the number of the batch, for a step that takes it.

    Returns:
        The loss with its graph; None if the step returns none. Lightning skips such a batch.
    """
    return training_step_of(module)(batch, batch_idx)


def training_step_of(module: L.LightningModule) -> Callable[[Any, int], Tensor | None]:
    """:func:`training_step` of a module, as a function of batch and number, for many calls."""
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def step(batch: Any, batch_idx: int) -> Tensor | None:
        result: Any = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
        loss: Tensor | None = result.get("loss") if isinstance(result, dict) else result
        return loss

    return step


def training_loss(module: L.LightningModule, batch: Any) -> Tensor:
    """The loss of a batch from :func:`training_step`.

    Raises:
        ValueError: if the step returns no loss.
    """
    loss = training_step(module, batch)
    if loss is None:
        raise ValueError(f"training_step of {type(module).__name__} returned no loss; return a scalar tensor")
    return loss
