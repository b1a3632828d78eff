"""A module's ``training_step``, called without a Trainer."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import lightning as L
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

Module = TypeVar("Module", bound=L.LightningModule)


class _WithoutTrainer:
    """What a LightningModule knows of its step."""

    place = 0, 0

    @property
    def current_epoch(self) -> int:
        return self.place[0]

    @property
    def global_step(self) -> int:
        return self.place[1]


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def silence(module: L.LightningModule) -> None:
    """Let a module's ``log`` and ``log_dict`` do nothing, for a ``training_step`` that no Trainer calls."""
    vars(module).update(log=_nothing, log_dict=_nothing)


def without_trainer(module: Module) -> Module:
    """Let a module take steps without a Trainer: it knows :func:`set_place`, and its logs go nowhere.

    Args:
        module: a copy of the user's module. Its class becomes a subclass of the user's.
    """
    kind = type(module)
    module.__class__ = type(kind.__name__, (_WithoutTrainer, kind), {})
    silence(module)
    return module


def set_place(module: L.LightningModule, epoch: int, step: int) -> None:
    """Set what ``current_epoch`` and ``global_step`` are.

    Args:
        module: a module from :func:`without_trainer`.
        epoch: the number of the epoch.
        step: the number of optimizer steps so far.
    """
    cast(Any, module).place = epoch, step


def training_step_of(module: L.LightningModule) -> Callable[[Any, int], Tensor | None]:
    """A module's ``training_step``, as a function of a batch on its device and the number of the batch.

    It returns the loss with its graph; None if the step returns none. Lightning skips such a batch.

    Args:
        module: a module from :func:`without_trainer`.

    Raises:
        ValueError: by the function, if the step needs the Trainer.
    """
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def step(batch: Any, batch_idx: int) -> Tensor | None:
        try:
            result: Any = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
        except RuntimeError as error:
            if "not attached to a `Trainer`" not in str(error):
                raise
            raise ValueError(
                f"training_step of {type(module).__name__} uses self.trainer, which it does not have here;"
                " self.current_epoch, self.global_step and self.log are allowed: store what else it needs in the module"
            ) from error
        loss: Tensor | None = result.get("loss") if isinstance(result, dict) else result
        return loss

    return step


def training_loss(module: L.LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """The loss of a batch from :func:`training_step_of`.

    Args:
        module: a module from :func:`without_trainer`.
        batch: a batch on its device.
        batch_idx: the number of the batch.

    Raises:
        ValueError: if the step returns no loss, or needs the Trainer.
    """
    loss = training_step_of(module)(batch, batch_idx)
    if loss is None:
        raise ValueError(f"training_step of {type(module).__name__} returned no loss; return a scalar tensor")
    return loss
