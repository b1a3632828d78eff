"""The base class of optimizer steps as functions, and the optimizers that have one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

Moments = Mapping[str, Tensor]
Factors = dict[str, dict[str, float]]  # of a linear update: for each result, those of the tensors before it


class OptimizerStep(ABC):
    """An optimizer's step as a function of parameter, gradient and moments, made of torch operations.

    A subclass names its optimizer, ``class MyStep(OptimizerStep, optimizer=MyOptimizer)``, and gives :meth:`update`.
    It is then known to :class:`~lightning_trak.TrainingRecorder` and :class:`~lightning_trak.methods.Metagradient`,
    which compare its result with that of the optimizer itself at each step.

    Attributes:
        moments: names of the tensors that the optimizer keeps for a parameter and that the next parameters depend on
            smoothly. Others, such as a count of steps, are constants.
        rounding: by how much the optimizer's own step may differ from :meth:`update`, relative to the step, beyond the
            rounding of the parameters' precision.
        elementwise: whether each number of the results depends on the same number of parameter, gradient and moments
            alone, as in SGD and Adam. Many targets then take less time. A class that overrides :meth:`update` has to
            say it again.
        linear: whether each result is a sum of parameter, gradient and moments, each times a factor that follows from
            the hyperparameters alone, as in SGD. One target then takes less time, too.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    rounding: ClassVar[float] = 0.0
    elementwise: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    known: ClassVar[dict[type[Optimizer], type[OptimizerStep]]] = {}

    def __init_subclass__(cls, optimizer: type[Optimizer] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in vars(cls):  # what a base class says is about its own update
            cls.elementwise = vars(cls).get("elementwise", False)
            cls.linear = vars(cls).get("linear", False)
        if optimizer is not None:
            OptimizerStep.known[optimizer] = cls

    @abstractmethod
    def update(
        self, parameter: Tensor, gradient: Tensor, kept: Moments, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter and its moments after a step. Nothing is changed in place.

        Args:
            parameter: the parameter.
            gradient: its gradient, after clipping.
            kept: what the optimizer keeps for the parameter, such as ``"exp_avg"``; empty at its first step.
            group: the hyperparameters.

        Returns:
            The new parameter, and the new values of :attr:`moments`. Those that are left out stay as they are.
        """

    def step(
        self, parameter: Tensor, gradient: Tensor, kept: Moments, group: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same as :meth:`update`, with the moments that it leaves out, as SGD without momentum does."""
        new, changed = self.update(parameter, gradient, kept, group)
        return new, {name: kept[name] for name in self.moments if name in kept} | changed

    @torch.no_grad()
    def factors(self, kept: Collection[str], group: Mapping[str, Any]) -> Factors:
        """The factors of a :attr:`linear` update: its results at unit vectors.

        Args:
            kept: names of the moments that the optimizer keeps for the parameter before the step.
            group: the hyperparameters.

        Returns:
            For ``"parameter"`` and each moment after the step, the factors of ``"parameter"``, ``"gradient"`` and
            moments before it, without those that are 0.
        """
        names = ["parameter", "gradient", *(name for name in self.moments if name in kept)]
        parameter, gradient, *units = torch.eye(len(names), dtype=torch.float64)
        new, moments = self.step(parameter, gradient, dict(zip(names[2:], units, strict=True)), group)
        results = {"parameter": new, **moments}
        return {
            result: {name: factor for name, factor in zip(names, values.tolist(), strict=True) if factor}
            for result, values in results.items()
        }


def optimizer_step(optimizer: type[Optimizer]) -> OptimizerStep:
    """The step of an optimizer.

    Raises:
        ValueError: if the optimizer has none. The error names those that have one.
    """
    step = OptimizerStep.known.get(optimizer)
    if step is None:
        names = ", ".join(sorted(kind.__name__ for kind in OptimizerStep.known))
        raise ValueError(
            f"the step of {optimizer.__module__}.{optimizer.__qualname__} is not known as a function that can be"
            f" differentiated; use one of {names}, or derive a class from lightning_trak.replay.OptimizerStep"
        )
    return step()


def optimizer_name(optimizer: type[Optimizer]) -> str:
    """The name of an optimizer's class in a recording."""
    return f"{optimizer.__module__}.{optimizer.__qualname__}"


def optimizer_named(name: str) -> type[Optimizer]:
    """The class of :func:`optimizer_name`, if it has a step.

    Raises:
        ValueError: if no optimizer of this name has a step.
    """
    for kind in OptimizerStep.known:
        if optimizer_name(kind) == name:
            return kind
    names = ", ".join(sorted(map(optimizer_name, OptimizerStep.known)))
    raise ValueError(
        f"the run was trained by {name}, whose step is not known here; known are {names}: import the module that"
        " derives a class from lightning_trak.replay.OptimizerStep for it"
    )
