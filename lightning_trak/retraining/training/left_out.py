"""What training many modules at once would leave out of what a Trainer does."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from torch.utils.data import DataLoader, RandomSampler, Subset, default_collate

from lightning_trak.packages import is_a, overrides
from lightning_trak.retraining.training.alone import is_permuting
from lightning_trak.running.batches import TRANSFER_HOOKS

# Hooks that a Trainer calls and `train_together` does not.
_SKIPPED_HOOKS = (
    *("setup", "prepare_data", "configure_model", "configure_callbacks", "on_fit_start", "on_fit_end"),
    *("on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_train_batch_start", "on_train_batch_end", *TRANSFER_HOOKS),
    *("on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step", "optimizer_step"),
    *("on_before_zero_grad", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step"),
)


def require_trainable_together(
    module: L.LightningModule, trainer: L.Trainer, loader: DataLoader[Any], subset: Subset[Any]
) -> None:
    """Check that :func:`train_together` does all that a Trainer would do.

    Args:
        module: one like those to be trained.
        trainer: the Trainer that would train one of them.
        loader: the loader that it would be trained on.
        subset: the examples that the loader was made for.

    Raises:
        TypeError: if it would leave out something that the Trainer does, naming it.
    """
    harmless = (ProgressBar, ModelSummary, Checkpoint)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    settings = {
        "gradient_clip_val": (trainer.gradient_clip_val, None),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
        "max_steps": (trainer.max_steps, -1),
        "precision": (str(trainer.precision), "32-true"),
        "limit_train_batches": (str(trainer.limit_train_batches), "1.0"),  # 1 means one batch
    }
    left_out = [
        *skipped_hooks(module),
        *(type(callback).__name__ for callback in callbacks if not is_a(callback, *harmless)),
        *(f"{name}={value} of the Trainer" for name, (value, plain) in settings.items() if value != plain),
        *(["max_epochs=-1 of the Trainer"] if (trainer.max_epochs or -1) < 1 else []),
        *_own_dataset(loader, subset),
        *_own_order(loader),
        *([] if loader.collate_fn is default_collate else ["the loader's collate_fn"]),
        *([f"drop_last={loader.drop_last} of the loader"] if loader.drop_last or not loader.batch_size else []),
    ]
    require_nothing_left_out(left_out)


def _own_dataset(loader: DataLoader[Any], subset: Subset[Any]) -> list[str]:
    own: Any = loader.dataset  # it may change the items, for example at random
    same = type(own) is Subset and own.dataset is subset.dataset and list(own.indices) == list(subset.indices)
    return [] if same else [f"the {type(own).__name__} that make_loader makes of the subset"]


def _own_order(loader: DataLoader[Any]) -> list[str]:
    if is_permuting(loader.sampler):
        return []
    if type(loader.sampler) is RandomSampler:
        return ["replacement or num_samples of the RandomSampler"]
    return [f"the order of {type(loader.sampler).__name__}"]


def skipped_hooks(module: L.LightningModule) -> list[str]:
    """The names of the hooks of a module that a Trainer would call."""
    return [f"{type(module).__name__}.{hook}" for hook in _SKIPPED_HOOKS if overrides(module, hook, L.LightningModule)]


def require_nothing_left_out(left_out: Sequence[str]) -> None:
    """Refuse to train many modules at once if this leaves out something.

    Args:
        left_out: the names of what it leaves out.

    Raises:
        TypeError: if there is something, naming it.
    """
    if left_out:
        raise TypeError(
            f"training many modules at once leaves out {', '.join(left_out)}; train them one at a time (a fleet: run()"
            " without together=)"
        )
