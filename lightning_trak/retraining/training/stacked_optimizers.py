"""The optimizer of many modules whose parameters are stacked, which must treat each of them as if it were alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_trak.compatibility import configure_optimizers, configure_schedulers
from lightning_trak.retraining.training.alone import FactoryError
from lightning_trak.texts.messages import listed

_ROUNDING = 1e-5
_SAME = (
    "the optimizer must have the same groups and settings for all modules, and treat each element of a parameter by"
    " itself, without norms or shapes"
)


def one_optimizer(module: L.LightningModule) -> tuple[Optimizer, list[LRSchedulerConfig]]:
    """The optimizer and schedulers that a module configures.

    Raises:
        TypeError: if the module uses manual optimization, or not one optimizer, or a scheduler that monitors something.
    """
    if not module.automatic_optimization:
        raise TypeError(
            f"{type(module).__name__} uses manual optimization, and many modules at once can only be trained with"
            " automatic optimization: train them one by one"
        )
    optimizers, schedulers, monitor = configure_optimizers(cast(Any, module.configure_optimizers()))
    if len(optimizers) != 1:
        raise TypeError(
            f"{type(module).__name__}.configure_optimizers() gave {len(optimizers)} optimizers; modules are trained"
            " together by one optimizer"
        )
    configured = configure_schedulers(schedulers, monitor)
    monitoring = [type(each.scheduler).__name__ for each in configured if each.reduce_on_plateau]
    if monitor is not None or monitoring:
        raise TypeError(
            f"a scheduler of {type(module).__name__} monitors something ({', '.join(monitoring) or monitor}), and"
            " modules that are trained together have no such numbers: train them one by one, or take a scheduler that"
            " monitors nothing"
        )
    return optimizers[0], configured


def advance(schedulers: list[LRSchedulerConfig], interval: str, done: int) -> None:
    """Step the schedulers of an interval where a Trainer does.

    Args:
        schedulers: the schedulers.
        interval: ``"step"`` or ``"epoch"``.
        done: how many steps of the epoch, or how many epochs, are done.
    """
    for config in schedulers:
        if config.interval == interval and done % config.frequency == 0:
            config.scheduler.step()  # type: ignore[call-arg]  # ReduceLROnPlateau would monitor something


Settings = dict[str, dict[str, str] | None]


class TrialStep(NamedTuple):
    """What an optimizer does with some gradients.

    Attributes:
        settings: those of each parameter, by its name; None if it is not trained.
        after: the parameters after a step, by name.
    """

    settings: Settings
    after: dict[str, Tensor]


def require_same_settings(modules: Sequence[L.LightningModule]) -> None:
    """Check that the optimizers of all modules train the same parameters, with the same settings.

    Raises:
        FactoryError: if a module differs from the first.
        TypeError: as :func:`one_optimizer`.
    """
    first, *others = (_new_optimizer(module)[1] for module in modules)
    for number, own in enumerate(others, 1):
        require_none(_differing(first, own), number, _SAME)


def trial_gradients(module: L.LightningModule, count: int) -> dict[str, Tensor]:
    """Some gradients for ``count`` modules like one, by name, stacked."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(count, *parameter.shape, generator=generator).to(parameter)
        for name, parameter in module.named_parameters()
    }


@torch.no_grad()
def trial_step(module: L.LightningModule, gradients: Mapping[str, Tensor]) -> TrialStep:
    """Take a step of a new optimizer. Then the parameters are put back.

    A scheduler may begin with a learning rate of zero. The step is taken with the one that it begins from.

    Args:
        module: the module.
        gradients: of its parameters, by name.

    Raises:
        FactoryError: if the optimizer cannot make the step.
        TypeError: as :func:`one_optimizer`.
    """
    optimizer, settings = _new_optimizer(module)
    parameters = dict(module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        # a copy, since some optimizers change gradients in place
        parameter.grad = gradients[name].clone() if parameter.requires_grad else None
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _no_step(module, error) from error
    finally:
        after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
            parameter.grad = None
    return TrialStep(settings, after)


def require_same_step(together: TrialStep, alone: TrialStep, number: int) -> None:
    """Check that a module takes the same step together with others as alone.

    Args:
        together: a step of all modules.
        alone: the step of one of them alone.
        number: of this one.

    Raises:
        FactoryError: if it takes another step.
    """
    wrong = [
        f"the step of {name}"
        for name, own in alone.after.items()
        if not torch.allclose(together.after[name][number], own, rtol=_ROUNDING, atol=_ROUNDING * 1e-3, equal_nan=True)
    ]
    require_none(_differing(together.settings, alone.settings) + wrong, number, _SAME)


def _new_optimizer(module: L.LightningModule) -> tuple[Optimizer, Settings]:
    try:
        optimizer, _ = one_optimizer(module)
    except ValueError as error:
        raise _no_step(module, error) from error
    names = {parameter: name for name, parameter in module.named_parameters()}
    settings: Settings = dict.fromkeys(names.values())
    for group in optimizer.param_groups:
        group["lr"] = group.get("initial_lr", group["lr"])
        own = {key: str(value) for key, value in group.items() if key != "params"}
        settings |= {names[part]: own for part in group["params"] if part in names and part.requires_grad}
    return optimizer, settings


def _differing(settings: Settings, others: Settings) -> list[str]:
    return [f"the settings of {name}" for name, own in settings.items() if others.get(name) != own]


def require_none(wrong: Sequence[str], number: int, advice: str) -> None:
    """Refuse a module that does something else together with the others than alone.

    Args:
        wrong: what differs.
        number: of the module.
        advice: what to do about it.

    Raises:
        FactoryError: if anything differs.
    """
    if wrong:
        raise FactoryError(
            f"{listed(wrong)} of module {number} differs between training together with the others and training alone:"
            f" {advice}, or train the modules one at a time"
        )


def _no_step(module: L.LightningModule, error: Exception) -> FactoryError:
    return FactoryError(
        f"the optimizer of {type(module).__name__} cannot make a step of many modules at once ({error}): train them one"
        " at a time"
    )
