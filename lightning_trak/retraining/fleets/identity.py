"""What the members of a fleet depend on: the initial module, its training, and its batches."""

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from lightning_trak.fingerprints import Fingerprint, fingerprint, module_fingerprint, new_fingerprint
from lightning_trak.packages import is_a
from lightning_trak.storage.files import tensor_digest

_WATCHES = (Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar)

_SETTINGS = (
    *("max_epochs", "max_steps", "min_epochs", "min_steps", "accumulate_grad_batches"),
    *("gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches", "limit_val_batches", "overfit_batches"),
)

# These change when callbacks and schedulers see a validation, and which random numbers are left for the next epoch. At
# Lightning's defaults they are left out.
_UNUSUAL = {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "reload_dataloaders_every_n_epochs": 0}


def describe_module(
    module: L.LightningModule, again: Any, make_module: Callable[[], Any], trainer: L.Trainer
) -> dict[str, Any]:
    """A module before training: its code, options, settings and initial weights.

    Args:
        module: a new module from ``make_module``.
        again: a second module, made with another seed.
        make_module: the user's function that made both.
        trainer: a Trainer, since ``configure_optimizers`` may use its settings.

    Raises:
        TypeError: if a hyperparameter cannot be described. The error names it.
    """
    return {
        "module": module_fingerprint(module, training=True),
        "make_module": None if isinstance(make_module, type) else fingerprint(make_module),
        "hyperparameters": {name: _hyperparameter(name, value) for name, value in module.hparams.items()},
        "initial_weights": _constant_weights(module, again),
        "optimizer": _optimizers(module, trainer),
    }


def _hyperparameter(name: str, value: Any) -> Any:
    try:
        return fingerprint(value, f'hyperparameter "{name}"')
    except TypeError as error:
        raise TypeError(f'{error}; leave it out by save_hyperparameters(ignore=["{name}"])') from error


def _constant_weights(module: L.LightningModule, again: Any) -> str:
    """A digest of the initial weights that do not depend on the seed, such as pretrained weights.

    Random weights are left out: several machines may share a fleet, and their random numbers may differ in the last
    bits.
    """
    others = again.state_dict() if isinstance(again, torch.nn.Module) else {}
    return tensor_digest(
        {
            name: tensor
            for name, tensor in module.state_dict().items()
            if isinstance(tensor, torch.Tensor) and name in others and torch.equal(tensor, others[name])
        }
    )


def _optimizers(module: L.LightningModule, trainer: L.Trainer) -> Any:
    """Optimizers and schedulers with their settings. None if they cannot be made before training."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.trainer = trainer
            made = module.configure_optimizers()
    except Exception:  # it may need the Trainer's data; the module's fingerprint has its code anyway
        return None
    walk = new_fingerprint()
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    described = _plan(made, walk, names)
    return {"made": described, "code": walk.code()}


def _plan(value: Any, walk: Fingerprint, names: dict[int, str]) -> Any:
    if isinstance(value, Optimizer):
        groups = [
            {name: walk.value(setting) for name, setting in group.items() if name != "params"}
            | {"parameters": [names.get(id(parameter)) for parameter in group["params"]]}
            for group in value.param_groups
        ]
        return {"class": walk.value(type(value)), "groups": dict(enumerate(groups))}
    if isinstance(value, LRScheduler):
        held = {name: _plan(item, walk, names) for name, item in vars(value).items() if name != "optimizer"}
        return {"class": walk.value(type(value)), **held}
    if isinstance(value, dict):
        return {str(key): _plan(item, walk, names) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plan(item, walk, names) for item in value]
    return walk.value(value)


def describe_trainer(trainer: L.Trainer) -> dict[str, Any]:
    """The settings of a Trainer that change training, and the callbacks that may change it."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    settings = {name: fingerprint(getattr(trainer, name)) for name in _SETTINGS}
    for name, usual in _UNUSUAL.items():
        value = getattr(trainer, name)
        if str(value) != str(usual):  # a val_check_interval of 1 is a validation after each batch
            settings[name] = fingerprint(value)
    acting = [
        callback
        for callback in callbacks
        if not is_a(callback, *_WATCHES) and not type(callback).__module__.startswith("lightning_trak.")
    ]
    return settings | {
        "precision": str(trainer.precision),
        "callbacks": {f"{number} {type(item).__name__}": _callback(item) for number, item in enumerate(acting)},
    }


def _callback(callback: L.Callback) -> Any:
    try:
        return fingerprint(callback, type(callback).__name__)
    except TypeError:  # for example, it holds an open file
        return fingerprint(callback)


def describe_loader(loader: DataLoader[Any], make_loader: Callable[..., Any] | None) -> dict[str, Any]:
    """How a loader makes batches.

    Args:
        loader: the loader of one of the subsets.
        make_loader: the user's function that made it; None if there is no such function.
    """
    return {
        "drop_last": loader.drop_last,
        "sampler": type(loader.sampler).__qualname__,
        "batch_sampler": type(loader.batch_sampler).__qualname__,
        "make_loader": None if make_loader is None else fingerprint(make_loader),
    }
