"""Many small models trained at once: their parameters are stacked, and each operation runs for all of them.

A step of a small model takes as long as it takes to start its operations, not to do them. One step of a hundred such
models, vectorised by `torch.func.vmap` over stacked parameters, takes little longer than a step of one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_trak.checkpoints.copies import computed
from lightning_trak.checks import integer, positive, require_factory, require_tensor
from lightning_trak.compatibility import tree_map
from lightning_trak.gradients.leaves import apart_from, leaves_of
from lightning_trak.gradients.substitution import Substituted
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, unchanged
from lightning_trak.retraining.training.alone import FactoryError, require_own_seed
from lightning_trak.retraining.training.left_out import require_nothing_left_out, skipped_hooks
from lightning_trak.retraining.training.stacked_optimizers import (
    advance,
    one_optimizer,
    require_none,
    require_same_settings,
    require_same_step,
    trial_gradients,
    trial_step,
)
from lightning_trak.running.data.content import sample_digest
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.training_step import set_place, training_loss, without_trainer
from lightning_trak.texts.messages import in_one_line


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
        take: use the first of the modules as ``stacked``, not a copy of it. In a copy, functions that were made in
            ``__init__`` still refer to the first module, and :meth:`map` refuses them.

    Attributes:
        stacked: a module whose parameters and buffers have one more dimension, the first, of size ``num_modules``.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device | str = "cpu", *, take: bool = False) -> None:
        states = [{name: tensor.detach() for name, tensor in _tensors(module)} for module in modules]
        self.stacked = modules[0] if take else copy.deepcopy(modules[0], computed(modules[0]))
        self._original = None if take else modules[0]
        for name, tensor in _tensors(self.stacked):
            tensor.data = torch.stack([state[name].to(device) for state in states])

    def __len__(self) -> int:
        return len(next(iter(_tensors(self.stacked)))[1])

    def map(
        self, function: Callable[..., Any], *args: Any, in_dims: int | None = 0, randomness: str = "different"
    ) -> Any:
        """``function(module, *args)`` for each module at once.

        Args:
            function: of a module; traced by `torch.func.vmap`, so it may not branch on the values of tensors.
            args: trees of tensors.
            in_dims: 0 if the arguments are stacked as the modules are, None if all modules get the same.
            randomness: ``"different"`` or ``"same"``: whether each module draws random numbers of its own.

        Raises:
            ValueError: if the modules hold functions that refer to one of the modules that were given, or vmap cannot
                run them.
        """
        call = _Call(self.stacked, function)
        tensors = dict(_tensors(call))

        def one(state: dict[str, Tensor], *inputs: Any) -> tuple[Any, dict[str, Tensor]]:
            given = dict(state)
            # By identity too: a parameter may also be kept in a list, or be used by a function that refers to it.
            with Substituted((tensor, given[name]) for name, tensor in tensors.items()):
                result = functional_call(call, state, inputs, tie_weights=False)  # all names are there
            # `functional_call` leaves in `state` the buffers that the module now has: new tensors, unless it changed
            # them in place.
            return result, {name: tensor for name, tensor in state.items() if tensor is not given[name]}

        mapped = vmap(one, in_dims=(0, *[in_dims] * len(args)), randomness=randomness)
        # The fused kernels of attention would run one module at a time.
        with sdpa_kernel(SDPBackend.MATH), exact_attention(), apart_from(self._original, self.stacked):
            try:
                result, replaced = mapped(tensors, *args)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # vmap cannot branch on values, and lacks some operations
                reason = in_one_line(error).rstrip(".")
                raise FactoryError(
                    f"torch.func.vmap cannot run many {type(self.stacked).__name__} at once: {reason}. Train them one"
                    " at a time (leave together= out)"
                ) from error
        self._original = None  # checking once is enough
        for name, tensor in replaced.items():
            tensors[name].data = tensor.detach()
        return result

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
    masks: Tensor,
    seeds: Sequence[int],
    *,
    max_epochs: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> StackedModules:
    """Train a fresh module on each subset of a dataset, all of them at once.

    What a Trainer does is done for each module: its own initialisation and order of examples, its ``training_step``,
    and the optimizer and scheduler of its ``configure_optimizers``, which must treat each element of a parameter by
    itself (SGD, Adam and AdamW do; Adafactor, LARS, LAMB and Muon do not). What a module draws while it trains, as for
    dropout, depends on which modules train with it. Before training, gradients of the first and of the last module are
    compared with those alone, where they are not random, and so is a step of their optimizer. All optimizers must have
    the same settings.

    Args:
        make_module: makes a module, in its own random initialisation. Its ``training_step`` may use ``batch_idx``,
            ``self.current_epoch`` and ``self.global_step``, but no Trainer.
        dataset: the whole training set, of items that ``default_collate`` can put together; it is held in memory. So
            items may not be augmented at random.
        masks: bool ``(num_modules, num_train)``, true where the subset of a module holds the example; the subsets are
            of one size.
        seeds: of each module: its initialisation, and the order of its examples.
        max_epochs: passes over the subset.
        batch_size: examples in a step; the last step of an epoch takes what is left.
        device: where to train.

    Returns:
        The trained modules, in eval mode.

    Raises:
        ValueError: if the subsets differ in size, or do not fit the seeds or the dataset; if items are augmented at
            random; or if the first or the last module has another loss, other gradients, or another step of its
            optimizer, together with the others than alone.
        TypeError: if the module uses manual optimization, more than one optimizer, or hooks that only a Trainer calls.
    """
    require_factory("make_module", make_module)
    require_tensor("masks", masks)
    max_epochs, batch_size = positive("max_epochs", max_epochs), positive("batch_size", batch_size)
    seeds, num_train = [integer("seeds", seed) for seed in seeds], len(cast(Any, dataset))
    if masks.shape != (len(seeds), num_train):
        raise ValueError(
            f"expected {len(seeds)} subsets, one for each seed, of {num_train} examples, got {tuple(masks.shape)}"
        )
    sizes = torch.unique(masks.sum(1))
    if len(sizes) != 1 or sizes[0] == 0:
        raise ValueError(f"modules are trained together on subsets of one size, got sizes {sizes.tolist()}")
    if sample_digest(DataLoader(dataset)) is None:
        raise FactoryError(
            "items of the dataset are not the same when they are loaded again, perhaps because of random augmentation."
            " Training many modules at once would load each item once, for all modules and epochs: train them one at a"
            " time (leave together= out)"
        )
    data = move_data_to_device(default_collate([dataset[i] for i in range(num_train)]), torch.device(device))
    with isolated_random_states():
        modules = []
        for seed in seeds:
            own = torch.manual_seed(seed).initial_seed()  # of a negative seed, another number
            modules.append(without_trainer(make_module()))
            require_own_seed(own)
        require_nothing_left_out(skipped_hooks(modules[0]))
        members = torch.stack([mask.nonzero().flatten() for mask in masks])
        stack = _stacked(modules, tree_map(lambda value: _take(value, members[:, :batch_size]), data), device)
        _fit(stack, data, members, seeds, max_epochs, batch_size)
    stack.stacked.eval()
    return stack


def _stacked(modules: list[L.LightningModule], batches: Any, device: torch.device | str) -> StackedModules:
    """Stack modules, after the first and the last were compared with what they do alone.

    Args:
        modules: the modules, which are used up.
        batches: a batch for each.
        device: where they will be trained.

    Raises:
        FactoryError: if one does something else together with the others.
    """
    compared = (0, len(modules) - 1)
    alone = {number: _alone(modules[number].to(device), batches, number) for number in compared}
    require_same_settings(modules)
    gradients = trial_gradients(modules[0], len(modules))
    steps = {n: trial_step(modules[n], {name: part[n] for name, part in gradients.items()}) for n in compared}
    stack = StackedModules(modules, device, take=True)
    _require_as_alone(stack, batches, alone)
    together = trial_step(cast(L.LightningModule, stack.stacked), gradients)
    for number, step in steps.items():
        require_same_step(together, step, number)
    return stack


class _Alone(NamedTuple):
    """What a step of a module gives before it is stacked with others.

    Attributes:
        loss: of its first batch.
        gradients: by name, where there are any.
        training: whether it was in training mode. A module that draws random numbers in it is compared in eval mode.
    """

    loss: Tensor
    gradients: dict[str, Tensor]
    training: bool


def _alone(module: L.LightningModule, batches: Any, number: int) -> _Alone | None:
    """A step of one module by plain autograd, which changes nothing; None if its loss differs each time.

    Raises:
        FactoryError: if its loss depends on tensors that require gradients and are not its parameters.
    """
    batch = tree_map(lambda value: value[number], batches)
    own = {id(parameter) for parameter in module.parameters()}
    for training in (True, False):
        with _only_looking(module, training):
            loss, again = (training_loss(module, tree_map(torch.clone, batch)) for _ in range(2))
            foreign = [leaf for leaf in leaves_of(loss) if id(leaf) not in own]
            if foreign:
                raise FactoryError(
                    f"the loss of {type(module).__name__} depends on {len(foreign)} tensors that require gradients and"
                    f" are not its parameters, the first of shape {tuple(foreign[0].shape)}: make them attributes of"
                    " the module, not items of a list or dict, or call requires_grad_(False) on them"
                )
            if not torch.allclose(loss, again, rtol=1e-4, equal_nan=True):
                continue
            parameters = {name: part for name, part in module.named_parameters() if part.requires_grad}
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            return _Alone(
                loss.detach(),
                {name: part for name, part in zip(parameters, gradients, strict=True) if part is not None},
                training,
            )
    return None


def _require_as_alone(stack: StackedModules, batches: Any, alone: dict[int, _Alone | None]) -> None:
    """Check that stacked modules do what each module does alone."""
    for number, expected in alone.items():
        if expected is None:
            continue
        with _only_looking(stack.stacked, expected.training):
            loss = _losses(stack, batches)
            parameters = dict(stack.stacked.named_parameters())
            names = [name for name in expected.gradients if parameters[name].requires_grad]
            found = torch.autograd.grad(loss.sum(), [parameters[name] for name in names], allow_unused=True)
        whole = sum(float(part.norm()) ** 2 for part in expected.gradients.values()) ** 0.5
        same = torch.allclose(loss[number], expected.loss, rtol=1e-3, atol=1e-6, equal_nan=True)
        wrong = [] if same else ["the loss"]
        for name, gradients in zip(names, found, strict=True):
            own = expected.gradients[name]
            error = own.norm() if gradients is None else (gradients[number].to_dense() - own.to_dense()).norm()
            if error > 1e-2 * own.norm() + 1e-3 * whole:
                wrong.append(f"the gradient of {name}")
        keep = "keep what differs from module to module in parameters and buffers (register_buffer)"
        require_none(wrong, number, f"{keep}, not in plain attributes")


def _losses(stack: StackedModules, batches: Any, number: int = 0) -> Tensor:
    """The loss of each module on its batch, which is the epoch's batch of this number."""
    losses: Tensor = stack.map(lambda module, batch: training_loss(module, batch, number), batches)
    return losses


@contextmanager
def _only_looking(module: nn.Module, training: bool) -> Iterator[None]:
    """A context for steps that leave the module, its buffers and the random state as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    with (
        isolated_random_states(),
        unchanged(module),
        sdpa_kernel(SDPBackend.MATH),
        exact_attention(),
    ):
        if not training:
            module.eval()
        yield
    for buffer, before in buffers:
        buffer.data = before


def _fit(
    stack: StackedModules, data: Any, members: Tensor, seeds: Sequence[int], max_epochs: int, batch_size: int
) -> None:
    """Train stacked modules, each on its ``members``: positions of examples, shape ``(num_modules, size)``."""
    module = cast(L.LightningModule, stack.stacked)
    optimizer, schedulers = one_optimizer(module)
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    steps = 0
    for epoch in range(max_epochs):
        shuffled = torch.stack(
            [row[torch.randperm(len(row), generator=order)] for row, order in zip(members, orders, strict=True)]
        )
        for number, positions in enumerate(torch.split(shuffled, batch_size, dim=1)):
            batch = tree_map(lambda value, at=positions: _take(value, at), data)
            set_place(module, epoch, steps)
            optimizer.zero_grad()
            _losses(stack, batch, number).sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps += 1
            advance(schedulers, "step", number + 1)
        advance(schedulers, "epoch", epoch + 1)


def _take(value: Tensor, positions: Tensor) -> Tensor:
    """``value[positions]``, several times as fast."""
    rows = value.index_select(0, positions.to(value.device).flatten())
    return rows.view(*positions.shape, *value.shape[1:])
