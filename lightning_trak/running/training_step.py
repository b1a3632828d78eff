"""A module's ``training_step``, called without a Trainer."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import lightning as L
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Self

Module = TypeVar("Module", bound=L.LightningModule)


class NeedsTrainerError(ValueError):
    """A step reads of its Trainer what it does not have without one."""


class _StepTrainer:
    """What a step may read of a Trainer, where there is none: its place, the optimizer, and a logger that does nothing.

    Args:
        epoch: the number of the epoch.
        step: the number of optimizer steps so far.
        optimizer: has the hyperparameters of the step; None if they are not known.
    """

    def __init__(self, epoch: int = 0, step: int = 0, optimizer: Optimizer | None = None) -> None:
        self.current_epoch, self.global_step = epoch, step
        self.global_rank = self.local_rank = 0
        self.world_size, self.is_global_zero = 1, True
        self.logger = DummyLogger()
        self.loggers = [self.logger]
        if optimizer is not None:
            self.optimizers = [optimizer]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise NeedsTrainerError(
            f"the module uses self.trainer.{name}, which it does not have here; self.current_epoch,"
            " self.global_step, self.log and self.logger are allowed, and in a recorded run self.optimizers() for its"
            " learning rate: store what else it needs in the module"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # the optimizer is only read


class _WithoutTrainer:
    """What a LightningModule knows of its step."""

    place = _StepTrainer()

    @property
    def trainer(self) -> _StepTrainer:
        return self.place

    @property
    def current_epoch(self) -> int:
        return self.place.current_epoch

    @property
    def global_step(self) -> int:
        return self.place.global_step

    @property
    def logger(self) -> DummyLogger:
        return self.place.logger

    @property
    def loggers(self) -> list[DummyLogger]:
        return self.place.loggers

    def optimizers(self, use_pl_optimizer: bool = True) -> Optimizer:
        del use_pl_optimizer
        return self.place.optimizers[0]


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


def set_place(module: L.LightningModule, epoch: int, step: int, optimizer: Optimizer | None = None) -> None:
    """Set what ``current_epoch`` and ``global_step`` are, and ``optimizers()``.

    Args:
        module: a module from :func:`without_trainer`.
        epoch: the number of the epoch.
        step: the number of optimizer steps so far.
        optimizer: has the hyperparameters of the step; it must not be changed.
    """
    cast(Any, module).place = _StepTrainer(epoch, step, optimizer)


def training_step_of(module: L.LightningModule) -> Callable[[Any, int], Tensor | None]:
    """A module's ``training_step``, as a function of a batch on its device and the number of the batch.

    It returns the loss with its graph; None if the step returns none. Lightning skips such a batch.

    Args:
        module: a module from :func:`without_trainer`.

    Raises:
        NeedsTrainerError: by the function, if the step needs the Trainer.
    """
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)

    def step(batch: Any, batch_idx: int) -> Tensor | None:
        try:
            result: Any = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
        except RuntimeError as error:
            if "not attached to a `Trainer`" not in str(error):
                raise
            raise NeedsTrainerError(
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
        ValueError: if the step returns no loss, or needs the Trainer (``NeedsTrainerError``).
    """
    loss = training_step_of(module)(batch, batch_idx)
    if loss is None:
        raise ValueError(f"training_step of {type(module).__name__} returned no loss; return a scalar tensor")
    return loss
