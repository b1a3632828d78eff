"""Trains the smooth twin of a run: the same run with smaller learning rates."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakSet

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_trak.texts.display import Displayed

# Their steps are not proportional to the learning rate.
_OTHER_STEP_SIZES = ("Adafactor", "LBFGS", "Rprop")

_scaled: WeakSet[Optimizer] = WeakSet()


class SmoothTwin(Displayed, Callback):
    """Trains with all learning rates multiplied by a factor, so that the run is smoother.

    Attributions of a smooth run are better, and those of a smooth twin, a run with a third of the learning rate, may
    also tell more about the original than its own do: see the guide "Which run?". The module and its
    ``configure_optimizers`` stay as they are. The learning rates of all groups of all optimizers are multiplied when
    training starts. Each scheduler goes on as if they were not: the rates are divided before its step and multiplied
    after it. So any scheduler works, with a minimum, a maximum or a metric of its own, and each rate of the twin is
    the factor times that of the original, to the last bits of rounding.

    List it before the callbacks that record training (:class:`TRAKCallback`, :class:`TrainingRecorder`). They, loggers
    and checkpoints have the twin's rates. ``trainer.fit(ckpt_path=...)`` continues a twin with the same factor.

    Args:
        factor: what the learning rates are multiplied by; more than 0 and at most 1.

    Raises:
        ValueError: if the factor is out of range. Before training: if an optimizer has a group without a learning rate,
            or steps that are not proportional to it (``Adafactor``, ``LBFGS``, ``Rprop``); if its rates were
            multiplied before; if the run continues one that was trained with another factor. During training: if
            something other than a scheduler changes a rate.

    Example::

        callbacks = [SmoothTwin(), TRAKCallback("twin/snapshots")]
        trainer = L.Trainer(max_epochs=15, callbacks=callbacks)
        trainer.fit(LitNet(), train_loader)  # a new module: it starts as the original
        trak = TRAK(model, "twin/snapshots", "twin/features", lag=1)
    """

    _shown = ("factor",)

    def __init__(self, factor: float = 0.3) -> None:
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
            raise ValueError(f"factor must be a number more than 0 and at most 1, got {factor!r}")
        self.factor = float(factor)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The factor. It is saved in Lightning checkpoints."""
        return {"factor": self.factor}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to continue a run that was trained with other learning rates."""
        before = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("factor", 1.0)
        if trainer.state.fn == "fit" and before != self.factor:
            raise ValueError(
                f"the checkpoint is of a run whose learning rates were multiplied by {before:g}, and SmoothTwin would"
                f" continue it with {self.factor:g}; train the twin from its first step, in a fit without ckpt_path="
            )

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Multiply the rates of the optimizers, and let the schedulers know nothing of it."""
        rates = {id(optimizer): _Rates(optimizer, self.factor) for optimizer in trainer.optimizers}
        for own in rates.values():
            own.begin()
        schedulers = {id(config.scheduler): config.scheduler for config in trainer.lr_scheduler_configs}
        for scheduler in schedulers.values():
            _hide(scheduler, rates[id(scheduler.optimizer)])


class _Rates:
    """The learning rates of an optimizer, which are a factor times those that its schedulers know.

    Args:
        optimizer: the optimizer.
        factor: the factor.

    Raises:
        ValueError: if the rates cannot be multiplied.
    """

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        name = type(optimizer).__name__
        if not isinstance(optimizer, Optimizer):
            raise ValueError(f"SmoothTwin needs optimizers of torch, got a {name}")
        if name in _OTHER_STEP_SIZES:
            raise ValueError(
                f"the steps of {name} are not proportional to its learning rate, so that SmoothTwin cannot make them"
                " smaller; use another optimizer"
            )
        for number, group in enumerate(optimizer.param_groups):
            rate = group.get("lr")
            if not isinstance(rate, (int, float, Tensor)) or not math.isfinite(rate):
                raise ValueError(f"group {number} of {name} has lr={rate!r}; SmoothTwin needs a number to multiply")
        if optimizer in _scaled:
            raise ValueError(
                f"the learning rates of this {name} were multiplied before; list one SmoothTwin, and let"
                " configure_optimizers make a new optimizer each time"
            )
        self.optimizer, self._factor = optimizer, factor
        self._known: list[float] = []

    def begin(self) -> None:
        """Multiply, and check after each step that nothing else has changed the rates."""
        _scaled.add(self.optimizer)
        self.optimizer.register_step_post_hook(lambda *_: self._require_known())
        self.optimizer.register_load_state_dict_post_hook(lambda _: self._note())
        self.multiply()

    def multiply(self) -> None:
        """From the schedulers' rates to those of the twin."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * self._factor
        self._note()

    def divide(self) -> None:
        """From the rates of the twin to those that the schedulers know."""
        self._require_known()
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] / self._factor

    def _note(self) -> None:
        self._known = self._current()

    def _current(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def _require_known(self) -> None:
        found = self._current()
        if found != self._known:
            raise ValueError(
                f"{type(self.optimizer).__name__} has the learning rates {_listed(found)}, but SmoothTwin had set"
                f" {_listed(self._known)}: a hook or a callback changes them or adds groups; let a scheduler of"
                " configure_optimizers do that"
            )


def _listed(rates: list[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _hide(scheduler: Any, rates: _Rates) -> None:
    """Let a scheduler change the rates as if they had not been multiplied."""
    kind = type(scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.divide()
        try:
            return kind.step(self, *args, **kwargs)
        finally:
            rates.multiply()

    scheduler.__class__ = type(kind.__name__, (kind,), {"step": step})
