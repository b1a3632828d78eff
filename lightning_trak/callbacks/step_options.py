"""Which tensors an optimizer step trains, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_trak.replay.optimizers.base import optimizer_step
from lightning_trak.replay.player import canonical_module_name
from lightning_trak.replay.recording.records import Settings, Structure

_requires_grad, _training = attrgetter("requires_grad"), attrgetter("training")
_NO_PARAMETERS = {"params": None}


class StepOptions:
    """Reads what a step trains and its numbers. They are made anew only when something has changed since the last step.

    Args:
        trainer: the Trainer, which accumulates and clips gradients.
        module: the module.
        parameters: its parameters by canonical name.
        optimizer: its optimizer.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, parameters: Mapping[str, Tensor], optimizer: Optimizer
    ) -> None:
        self._trainer, self._optimizer, self._parameters = trainer, optimizer, parameters
        self._modules = dict(module.named_modules())
        self._own, self._parts = list(parameters.values()), list(self._modules.values())
        self._last_trained: Any = None
        self._last_settings: dict[Any, Settings] = {}

    def read(self) -> tuple[Structure, Settings]:
        """The options of the next step.

        Raises:
            ValueError: if the optimizer trains tensors that are not parameters of the module, or has settings that
                cannot be recorded.
        """
        trainer, groups = self._trainer, self._optimizer.param_groups
        trained = (
            [list(map(id, group["params"])) for group in groups],
            list(map(_requires_grad, self._own)),
            list(map(_training, self._parts)),
        )
        if trained != self._last_trained:
            self._structure, self._last_trained = self._make_structure(), trained
        key = (
            *[tuple((group | _NO_PARAMETERS).values()) for group in groups],
            trainer.accumulate_grad_batches,
            trainer.gradient_clip_val,
            trainer.gradient_clip_algorithm,
        )
        try:
            settings = self._last_settings.get(key)  # by hash, since a tensor would equal a number
        except TypeError:  # a list has no hash, and may have changed
            return self._structure, self._make_settings()
        if settings is None:
            settings = self._make_settings()
            self._last_settings = {key: settings}
        return self._structure, settings

    def _make_structure(self) -> Structure:
        names = {parameter: name for name, parameter in self._parameters.items()}
        groups = [group["params"] for group in self._optimizer.param_groups]
        unknown = sum(parameter not in names for group in groups for parameter in group)
        if unknown:
            raise ValueError(
                f"{type(self._optimizer).__name__} trains {unknown} tensors that are not parameters of the module;"
                " register them, so that they are recorded"
            )
        return Structure(
            tuple(tuple(names[parameter] for parameter in group) for group in groups),
            tuple(name for name, parameter in self._parameters.items() if not parameter.requires_grad),
            tuple(canonical_module_name(name) for name, part in self._modules.items() if not part.training),
        )

    def _make_settings(self) -> Settings:
        trainer = self._trainer
        clip_by = trainer.gradient_clip_algorithm or "norm"
        return Settings(
            _group_settings(self._optimizer),
            trainer.accumulate_grad_batches,
            float(trainer.gradient_clip_val or 0),
            str(getattr(clip_by, "value", clip_by)),
        )


def _group_settings(optimizer: Optimizer) -> tuple[dict[str, Any], ...]:
    """The hyperparameters of each group.

    Raises:
        ValueError: if a step of the optimizer cannot be repeated or differentiated.
    """
    optimizer_step(type(optimizer))
    found = []
    for group in optimizer.param_groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        for name, value in settings.items():
            if not isinstance(value, (bool, int, float, str, tuple, list, type(None))):
                raise ValueError(
                    f"{type(optimizer).__name__} has {name}={value!r:.40}, a {type(value).__name__}; TrainingRecorder"
                    " needs plain numbers"
                )
        found.append(settings)
    return tuple(found)
