"""Which runs can be recorded, and why others cannot."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader

from lightning_trak.checkpoints.copies import copy_module
from lightning_trak.compatibility import BatchNorm, has_gradient_hooks
from lightning_trak.packages import both, is_a, overrides
from lightning_trak.replay.recording.states import named_buffers, named_parameters
from lightning_trak.running.batches import TransferHooks, on_device
from lightning_trak.running.data.loading import batch_size_of, load, num_examples
from lightning_trak.running.random_states import RandomWatch, isolated_random_states
from lightning_trak.running.training_step import NeedsTrainerError, set_place, training_step_of, without_trainer

# Hooks of a LightningModule that make other gradients than Lightning does. An optimizer_step or optimizer_zero_grad of
# its own may change learning rates, which are recorded; if it does more, the repeated run differs, and is refused.
_OWN_GRADIENTS = ("backward", "configure_gradient_clipping")


def require_plain(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a run that cannot be repeated step by step."""
    reason = _reason(trainer, module)
    if reason:
        raise ValueError(f"TrainingRecorder cannot record this run: {reason}")


def _reason(trainer: Trainer, module: LightningModule) -> str | None:
    name = type(module).__name__
    plugin = trainer.precision_plugin
    if trainer.world_size > 1 or not is_a(trainer.strategy, SingleDeviceStrategy):
        return (
            f"it runs with {type(trainer.strategy).__name__} on {trainer.world_size} devices, and gradients that are"
            " averaged over processes are not repeated; train with devices=1"
        )
    if type(plugin) not in both(Precision) and not is_a(plugin, DoublePrecision):
        return (
            f"precision {trainer.precision!r} rounds steps so coarsely that their derivatives are noise; train with"
            ' precision="32-true" or "64-true"'
        )
    if not module.automatic_optimization:
        return f"{name} uses manual optimization, so its steps are not known; use automatic optimization"
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "training_step takes dataloader_iter, so the examples of a batch are not known; let it take a batch"
    averages = any(is_a(callback, StochasticWeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if averages and any(isinstance(part, BatchNorm) for part in module.modules()):
        return (
            "StochasticWeightAveraging ends with an epoch that computes the statistics of batch normalization anew,"
            " which a repeated run would not do; train without it"
        )
    own = [hook for hook in _OWN_GRADIENTS if overrides(module, hook, L.LightningModule)]
    if own:
        return (
            f"{name} overrides {own[0]}, so it is not known which gradients a step is made of; leave it out (use"
            " Trainer(gradient_clip_val=...) for clipping)"
        )
    return None


def require_same_batches(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> None:
    """Refuse batch transfer hooks that draw random numbers: they run before the step whose numbers are recorded."""
    own = _transfer_hooks(trainer, module).overridden()
    if not own:
        return
    watch = RandomWatch(trainer.strategy.root_device)
    with isolated_random_states():
        batch = _first_batch(loader)
        watch.before()
        _on_device(batch, trainer, module)
        drawn = watch.drawn()
    if drawn:
        raise ValueError(
            f"TrainingRecorder cannot record this run: {' or '.join(own)} draws random numbers, before the step, and"
            " those of the step alone are recorded; augment in training_step"
        )


def require_step_alone(trainer: Trainer, module: LightningModule, loader: DataLoader[Any]) -> None:
    """Refuse a ``training_step`` that reads of its Trainer what a repeated step does not have.

    A copy of the module takes a step without the Trainer. Other errors say nothing, since hooks that come later may
    make what the step needs.
    """
    try:
        copied = without_trainer(cast(L.LightningModule, copy_module(module, configure=False)))
        set_place(copied, trainer.current_epoch, trainer.global_step, trainer.optimizers[0])
        with (
            isolated_random_states(),
            trainer.precision_plugin.train_step_context(),
            torch.compiler.set_stance("force_eager"),
        ):
            training_step_of(copied)(_on_device(_first_batch(loader), trainer, copied), 0)
    except NeedsTrainerError as error:
        raise ValueError(f"TrainingRecorder cannot record this run, whose steps are repeated alone: {error}") from error
    except Exception:
        return


def _transfer_hooks(trainer: Trainer, module: LightningModule) -> TransferHooks:
    return TransferHooks(module, trainer.datamodule)  # type: ignore[attr-defined]


def _first_batch(loader: DataLoader[Any]) -> Any:
    first = range(min(batch_size_of(loader), num_examples(loader)))
    (batch,) = load(loader, [first], one_worker=True)
    return batch


def _on_device(batch: Any, trainer: Trainer, module: LightningModule) -> Any:
    convert, hooks = trainer.precision_plugin.convert_input, _transfer_hooks(trainer, module)
    (moved,) = on_device([batch], trainer.strategy.root_device, convert, hooks)
    return moved


def require_real(module: LightningModule) -> None:
    """Refuse parameters that are not of real numbers in float32 or in float64, or that have hooks or no shape yet."""
    hooked = [name for name, parameter in named_parameters(module).items() if has_gradient_hooks(parameter)]
    if hooked:
        raise ValueError(
            f'TrainingRecorder cannot record this run: the parameter "{hooked[0]}" has a gradient hook, which a'
            " repeated step would not call; remove it"
        )
    lazy = [name for name, parameter in named_parameters(module).items() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f'TrainingRecorder cannot record this run: the parameter "{lazy[0]}" of a lazy layer has no shape yet; call'
            " the module with a batch before training, which gives it one"
        )
    dtypes = {parameter.dtype for parameter in module.parameters() if parameter.requires_grad}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        found = ", ".join(sorted(map(str, dtypes))) or "none"
        raise ValueError(
            "TrainingRecorder needs weights that are all of torch.float32 or all of torch.float64, got"
            f" {found}; convert the module"
        )
    for name, buffer in named_buffers(module).items():
        if buffer.layout != torch.strided or buffer.is_complex() or type(buffer) not in (Tensor, nn.Parameter):
            raise ValueError(
                f'TrainingRecorder cannot keep the buffer "{name}", which is not a plain dense tensor of real numbers;'
                " register one that is"
            )
