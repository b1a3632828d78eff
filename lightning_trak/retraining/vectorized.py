"""Many small models trained at once: their parameters are stacked, and each operation runs for all of them.

A step of a small model takes as long as it takes to start its operations, not to do them. One step of a hundred such
models, vectorised by `torch.func.vmap` over stacked parameters, takes little longer than a step of one.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Checkpoint, ModelSummary, ProgressBar
from lightning.pytorch.core.optimizer import _configure_optimizers, _configure_schedulers_automatic_opt
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from lightning_trak.outputs import ModelOutput
from lightning_trak.retraining.training import UNHEARD_LOG, training_loss


class _Call(nn.Module):
    """Makes any function of a module its ``forward``, which is what `functional_call` calls."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *args: Any) -> Any:
        return self.function(self.module, *args)


class StackedModules:
    """Modules of one architecture, each with its own parameters and buffers.

    Args:
        modules: at least one; they are left alone.
        device: where the stacked parameters live.

    Attributes:
        stacked: a module whose parameters and buffers have one more dimension, the first, of size ``num_modules``.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device | str = "cpu") -> None:
        self.stacked = copy.deepcopy(modules[0])
        states = [dict(_tensors(module)) for module in modules]
        for name, tensor in _tensors(self.stacked):
            tensor.data = torch.stack([state[name].detach() for state in states]).to(device)

    def __len__(self) -> int:
        return len(next(iter(_tensors(self.stacked)))[1])

    def map(self, function: Callable[..., Any], *args: Any, in_dims: int | None = 0) -> Any:
        """``function(module, *args)`` for each module at once.

        Args:
            function: of a module; traced by `torch.func.vmap`, so it may not branch on the values of tensors.
            args: trees of tensors.
            in_dims: 0 if the arguments are stacked as the modules are, None if all modules get the same.
        """
        call = _Call(self.stacked, function)

        def one(state: dict[str, Tensor], *inputs: Any) -> Any:
            return functional_call(call, state, inputs, tie_weights=False)  # all names are there

        mapped = vmap(one, in_dims=(0, *[in_dims] * len(args)), randomness="different")
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention would run one module at a time
            return mapped(dict(_tensors(call)), *args)

    def outputs(self, output: ModelOutput, batch: Any) -> Tensor:
        """The output of each example of a batch by each module, shape ``(num_modules, batch)``."""
        with torch.no_grad():
            result: Tensor = self.map(output.output, batch, in_dims=None)
        return result

    def state_dicts(self) -> list[dict[str, Tensor]]:
        """The state dict of each module, as the module itself would give it."""
        states = self.stacked.state_dict()
        return [{name: tensor[i].cpu().clone() for name, tensor in states.items()} for i in range(len(self))]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers: those of a shared module once, a shared tensor once for each module that holds it."""
    for prefix, part in module.named_modules():
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            yield f"{prefix}.{name}" if prefix else name, tensor


def train_together(
    make_module: Callable[[], L.LightningModule],
    dataset: Dataset[Any],
    subsets: Tensor,
    seeds: Sequence[int],
    *,
    max_epochs: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> StackedModules:
    """Train a fresh module on each subset of a dataset, all of them at once.

    What a Trainer does is done for each module: its own initialisation and order of examples, its ``training_step``,
    and the optimizer and scheduler of its ``configure_optimizers``, which must treat each element of a parameter by
    itself (SGD, Adam and AdamW do; LARS, LAMB and Muon do not). What a module draws while it trains, as for dropout,
    depends on which modules train with it.

    Args:
        make_module: makes a module, in its own random initialisation; ``training_step`` may take ``batch`` alone.
        dataset: the whole training set, of items that ``default_collate`` can put together; it is held in memory.
        subsets: bool ``(num_modules, num_train)``, the examples that each module sees: as many for every module.
        seeds: of each module: its initialisation, and the order of its examples.
        max_epochs: passes over the subset.
        batch_size: examples in a step; the last step of an epoch takes what is left.
        device: where to train.

    Returns:
        The trained modules, in eval mode.

    Raises:
        ValueError: if the subsets differ in size, or do not fit the seeds or the dataset.
        TypeError: if the module optimizes by hand, or with more than one optimizer.
    """
    num_train = len(cast(Any, dataset))
    if subsets.shape != (len(seeds), num_train):
        raise ValueError(
            f"expected {len(seeds)} subsets, one for each seed, of {num_train} examples, got {tuple(subsets.shape)}"
        )
    sizes = torch.unique(subsets.sum(1))
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"modules are trained together on subsets of one size, got sizes {sizes.tolist()}")
    data = move_data_to_device(default_collate([dataset[i] for i in range(num_train)]), torch.device(device))
    with isolate_rng():
        modules = []
        for seed in seeds:
            torch.manual_seed(seed)
            modules.append(make_module())
        stack = StackedModules(modules, device)
        stack.stacked.train()
        _fit(stack, data, subsets, seeds, max_epochs, batch_size)
    stack.stacked.eval()
    return stack


# What a Trainer would call and `train_together` does not.
_UNHEARD_HOOKS = (
    *("setup", "prepare_data", "configure_model", "configure_callbacks", "on_fit_start", "on_fit_end"),
    *("on_train_start", "on_train_end", "on_train_epoch_start", "on_train_epoch_end"),
    *("on_train_batch_start", "on_train_batch_end", "on_before_batch_transfer", "transfer_batch_to_device"),
    *("on_after_batch_transfer", "on_before_backward", "backward", "on_after_backward", "on_before_optimizer_step"),
    *("optimizer_step", "on_before_zero_grad", "optimizer_zero_grad", "configure_gradient_clipping"),
    *("lr_scheduler_step",),
)


def require_trainable_together(module: L.LightningModule, trainer: L.Trainer, loader: DataLoader[Any]) -> None:
    """Check that :func:`train_together` does all that a Trainer would do.

    Args:
        module: one like those to be trained.
        trainer: the Trainer that would train one of them.
        loader: the loader that it would be trained on.

    Raises:
        TypeError: if it would leave something out, naming it.
    """
    harmless = (ProgressBar, ModelSummary, Checkpoint)
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    settings = {
        "gradient_clip_val": (trainer.gradient_clip_val, None),
        "accumulate_grad_batches": (trainer.accumulate_grad_batches, 1),
        "max_steps": (trainer.max_steps, -1),
        "precision": (str(trainer.precision), "32-true"),
        "limit_train_batches": (trainer.limit_train_batches, 1.0),
        "overfit_batches": (trainer.overfit_batches, 0.0),  # type: ignore[attr-defined]
    }
    left_out = [
        *(
            f"{type(module).__name__}.{hook}"
            for hook in _UNHEARD_HOOKS
            if is_overridden(hook, module, L.LightningModule)
        ),
        *(type(callback).__name__ for callback in callbacks if not isinstance(callback, harmless)),
        *(f"{name}={value!r} of the Trainer" for name, (value, plain) in settings.items() if value != plain),
        *(["max_epochs=-1 of the Trainer"] if (trainer.max_epochs or -1) < 1 else []),
        *([] if type(loader.sampler) is RandomSampler else [f"the order of {type(loader.sampler).__name__}"]),
        *([] if loader.collate_fn is default_collate else ["the loader's collate_fn"]),
        *([f"drop_last={loader.drop_last} of the loader"] if loader.drop_last or not loader.batch_size else []),
    ]
    if left_out:
        raise TypeError(f"training many modules at once leaves out {', '.join(left_out)}; train them one at a time")


def _fit(
    stack: StackedModules, data: Any, subsets: Tensor, seeds: Sequence[int], max_epochs: int, batch_size: int
) -> None:
    optimizer, schedulers = _optimizer(cast(L.LightningModule, stack.stacked))
    members = torch.stack([mask.nonzero().flatten() for mask in subsets])
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", UNHEARD_LOG)
        for _ in range(max_epochs):
            shuffled = torch.stack(
                [row[torch.randperm(len(row), generator=order)] for row, order in zip(members, orders, strict=True)]
            )
            for positions in torch.split(shuffled, batch_size, dim=1):
                batch = tree_map(lambda value, at=positions: _take(value, at), data)
                optimizer.zero_grad()
                stack.map(training_loss, batch).sum().backward()
                optimizer.step()
                _advance(schedulers, "step")
            _advance(schedulers, "epoch")


def _take(value: Tensor, positions: Tensor) -> Tensor:
    """``value[positions]``, several times as fast."""
    rows = value.index_select(0, positions.to(value.device).flatten())
    return rows.view(*positions.shape, *value.shape[1:])


def _optimizer(module: L.LightningModule) -> tuple[Optimizer, list[LRSchedulerConfig]]:
    if not module.automatic_optimization:
        raise TypeError(f"{type(module).__name__} optimizes by hand, which is not done for many modules at once")
    optimizers, schedulers, monitor = _configure_optimizers(cast(Any, module.configure_optimizers()))
    if len(optimizers) != 1 or monitor is not None:
        raise TypeError(
            f"{type(module).__name__}.configure_optimizers() gave {len(optimizers)} optimizers, monitor={monitor!r};"
            " modules are trained together by one optimizer, with schedulers that monitor nothing"
        )
    return optimizers[0], _configure_schedulers_automatic_opt(schedulers, monitor)


def _advance(schedulers: list[LRSchedulerConfig], interval: str) -> None:
    for config in schedulers:
        if config.interval == interval:
            config.scheduler.step()  # type: ignore[call-arg]  # ReduceLROnPlateau would monitor something
