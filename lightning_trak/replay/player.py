"""Does the steps of a recorded run again, with a copy of the user's module and an optimizer of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_trak.checkpoints.copies import copy_module
from lightning_trak.compatibility import WRAPPERS, BatchNorm, original_module
from lightning_trak.gradients.leaves import apart_from, require_own_leaves
from lightning_trak.packages import is_a
from lightning_trak.replay.comparison import other_step
from lightning_trak.replay.optimizers.base import optimizer_named, optimizer_step
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.recording.records import MicroBatch, StepRecord
from lightning_trak.replay.recording.states import Difference, TrainingState, difference, named_parameters
from lightning_trak.running.batches import TransferHooks, on_device
from lightning_trak.running.data.content import sample_digest
from lightning_trak.running.data.loading import load, num_examples
from lightning_trak.running.random_states import restore_random_states
from lightning_trak.running.training_step import set_place, training_step_of, without_trainer

# The loss of a batch, which the module is to be differentiated by; None if the batch is skipped.
Loss = Callable[[Any, MicroBatch], Tensor | None]

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}


class ReplayError(ValueError):
    """The recorded run cannot be repeated."""


@dataclass(frozen=True)
class Played:
    """What a step was made of, to differentiate it.

    Attributes:
        record: the step.
        before: the state before it.
        batches: its batches, on the device.
        losses: what ``training_step`` returned for each of them, before division; None if it returned none.
    """

    record: StepRecord
    before: TrainingState
    batches: list[Any]
    losses: list[Tensor | None]


class Player:
    """A copy of the user's module that does recorded steps again.

    Args:
        model: the user's module. It is not touched.
        recording: the recording of its run.
        loader: the training data, as they were recorded.
        datamodule: the data module that gave them, if there is one.
        device: the device to compute on.

    Attributes:
        module: the copy.
        kinds: the types of its submodules.
        optimizer: its optimizer.
        dtype: the dtype of the parameters that training changes.

    Raises:
        ReplayError: if the module or the data are not those of the recording.
        TypeError: if the model is not a LightningModule.
    """

    def __init__(
        self,
        model: nn.Module,
        recording: Recording,
        loader: torch.utils.data.DataLoader[Any],
        datamodule: L.LightningDataModule | None,
        device: torch.device,
    ) -> None:
        original = original_module(model)
        if not is_a(original, L.LightningModule):
            raise TypeError(f"expected the LightningModule that was trained, got a {type(original).__name__}")
        self.recording, self.loader, self.device = recording, loader, device
        self._original = original
        run = recording.run
        self._optimizer_kind = optimizer_named(run["optimizer"])
        self.update = optimizer_step(self._optimizer_kind)
        self._precision: Precision = DoublePrecision() if run["precision"] == "64-true" else Precision()
        self.module = without_trainer(cast(L.LightningModule, self._precision.convert_module(copy_module(original))))
        self.module.to(device)
        for part in self.module.modules():
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                part.sparse = False  # the same gradient in dense form, which all operations accept
        self.kinds = {type(part) for part in self.module.modules()}
        self._loss_of = training_step_of(self.module)
        self.parameters = named_parameters(self.module)
        self._modules = [(canonical_module_name(name), part) for name, part in self.module.named_modules()]
        self._require_same(describe_parameters(self.module), run)
        self._datamodule = datamodule
        self._batches: Iterator[Any] = iter(())
        self._leaves_checked = False
        first = recording.record(0)
        self._structure, self.optimizer = first.structure, self._made(first)
        trained = [name for group in first.structure.groups for name in group]
        trained.sort(key=lambda name: name in first.structure.frozen)  # frozen ones may have another dtype
        self.dtype = self.parameters[trained[0]].dtype

    def _require_same(self, parameters: list[Any], run: dict[str, Any]) -> None:
        if parameters != run["parameters"]:
            names = {name for name, _ in parameters} ^ {name for name, _ in run["parameters"]}
            what = f"parameters are {', '.join(sorted(names)[:3])}" if names else "shapes of parameters are others"
            raise ReplayError(
                f"this {type(self.module).__name__} is not the module of the recording: {what} in only one of them;"
                " pass a module of the same class with the same options"
            )
        total = num_examples(self.loader)
        if total != run["num_train"]:
            raise ReplayError(
                f"the training data have {total} examples, but those of the recording had {run['num_train']}; pass the"
                " same data in the same order"
            )
        if sample_digest(self.loader) != run["data"]:
            raise ReplayError(
                "the training data are not those of the recording, judged by eight examples as the loader collates"
                " them; pass the same DataLoader, with the same dataset and collate function"
            )

    # Steps

    def open(self, records: Iterable[StepRecord]) -> None:
        """Begin to load the batches of some steps, in this order."""
        self._batches = self.batches_of(batch.positions for record in records for batch in record.micro_batches)

    def batches(self, record: StepRecord) -> Iterator[Any]:
        """The next batches of :meth:`open`, which are those of a step, on the device."""
        for _ in record.micro_batches:
            yield next(self._batches)

    def batches_of(self, positions: Iterable[Sequence[int]]) -> Iterator[Any]:
        """Batches of training examples at some positions, on the device."""
        return self.moved(load(self.loader, positions), self._datamodule)

    def moved(self, batches: Iterable[Any], datamodule: L.LightningDataModule | None) -> Iterator[Any]:
        """Move batches to the device, as the Trainer does.

        Args:
            batches: batches as a loader collates them.
            datamodule: the data module that gave the loader, if there is one.
        """
        hooks = TransferHooks(self.module, datamodule)
        return on_device(batches, self.device, self._precision.convert_input, hooks)

    def load(self, state: TrainingState) -> None:
        """Set module and optimizer to a state."""
        self._loaded = state
        state.load(self.module, self.optimizer, self.parameters)

    @property
    def state(self) -> TrainingState:
        """A copy of the current state."""
        return TrainingState.of(self.module, self.optimizer, self.parameters).copy()

    def state_before(self, step: int) -> TrainingState:
        """The state before a step: the recorded one, or computed again from the one before it."""
        start = max(recorded for recorded in self.recording.state_steps if recorded <= step)
        state = self.recording.state(start)
        if start == step:
            return state
        self.load(state)
        self.open(map(self.recording.record, range(start, step)))
        for number in range(start, step):
            self.step(self.recording.record(number))
        return self.state

    def step(self, record: StepRecord, remember: bool = False, loss: Loss | None = None) -> Played | None:
        """Do a step again. Its batches come from :meth:`open`.

        Args:
            record: the step.
            remember: whether to return what the step was made of.
            loss: what the step minimizes; default: what ``training_step`` returns.
        """
        before = self.state if remember else None
        batches = []

        def taken() -> Iterator[Any]:
            for batch in self.batches(record):
                if remember:
                    batches.append(copy.deepcopy(batch))  # a training_step may change its batch
                yield batch

        losses = self.descend(record, taken(), loss)
        return None if before is None else Played(record, before, batches, losses)

    def descend(self, record: StepRecord, batches: Iterable[Any], loss: Loss | None = None) -> list[Tensor | None]:
        """Do a step with given batches.

        Args:
            record: the step.
            batches: its batches, on the device. They may be changed.
            loss: what the step minimizes; default: what ``training_step`` returns.

        Returns:
            The loss of each micro-batch, before division; None if there was none.
        """
        loss = loss or self.training_loss
        self.arrange(record)
        optimizer, settings = self.optimizer, record.settings
        optimizer.zero_grad()
        losses: list[Tensor | None] = []
        for micro, batch in zip(record.micro_batches, batches, strict=True):
            restore_random_states(micro.random_states, self.device)
            with self.computing():
                value = loss(batch, micro)
            losses.append(None if value is None else value.detach().clone())
            if value is not None:
                (value / settings.accumulate).backward()  # type: ignore[no-untyped-call]
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if settings.clip > 0:
            if settings.clip_by == "value":
                nn.utils.clip_grad_value_(trained, settings.clip)
            else:
                nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        return losses

    def training_loss(self, batch: Any, micro: MicroBatch) -> Tensor | None:
        """What ``training_step`` returns for a batch, which it may change; None if it skips the batch."""
        if self._leaves_checked:
            return self._loss_of(batch, micro.batch_idx)
        with apart_from(self._original, self.module) as made:
            # A copy is made here, so that a model may differentiate by its own input.
            loss = self._loss_of(copy.deepcopy(batch), micro.batch_idx)
        if loss is not None:
            require_own_leaves(loss, self.module, made=made)
            self._leaves_checked = True
        return loss

    def arrange(self, record: StepRecord) -> None:
        """Set modes, flags and hyperparameters to those of a step."""
        structure, groups = record.structure, record.settings.groups
        evaluating, frozen = set(structure.evaluating), set(structure.frozen)
        for name, part in self._modules:  # each time, since targets are computed in eval mode
            if part.training == (name in evaluating):
                part.training = name not in evaluating
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name not in frozen)
        if structure != self._structure:
            before = self.optimizer.state
            self._structure, self.optimizer = structure, self._made(record)
            self.optimizer.state = before
        for own, group in zip(self.optimizer.param_groups, groups, strict=True):
            own.update(group)
        set_place(self.module, record.epoch, record.step, self.optimizer)

    def normalizes_batches(self, first: int = 0) -> bool:
        """Whether batch normalization makes the examples of a batch depend on each other, from a first step on."""
        layers = {name: part for name, part in self._modules if isinstance(part, BatchNorm)}
        always = any(layer.running_mean is None for layer in layers.values())
        structures = {self.recording.record(step).structure for step in range(first, self.recording.num_steps)}
        return always or any(not layers.keys() <= set(structure.evaluating) for structure in structures)

    def _made(self, record: StepRecord) -> Optimizer:
        """A new optimizer with the groups of a step."""
        pairs = zip(record.structure.groups, record.settings.groups, strict=True)
        groups = [{"params": [self.parameters[name] for name in names], **group} for names, group in pairs]
        make: Callable[[Any], Optimizer] = self._optimizer_kind
        return make(groups)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute as the Trainer did."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            self._precision.train_step_context(),
        ):
            yield

    def require_close(self, step: int, tolerance: float | None = None) -> Difference | None:
        """Check that the current state is the recorded one, up to rounding.

        Returns:
            How far they are apart; None if no state is recorded before this step.

        Raises:
            ReplayError: if a tensor differs by more than ``tolerance``, relative to its norm; by default, also if the
                weights differ by more than rounding, relative to how far they moved since :meth:`load`.
        """
        if step not in self.recording.state_steps:
            return None
        own, recorded = self.state, self.recording.state(step)
        found = difference(own, recorded)
        largest = TOLERANCES.get(self.dtype, 0.0) if tolerance is None else tolerance
        off = None
        if found.largest > largest:
            off = (
                f"{found.name} differs from the recorded one by {found.largest:.2g} of its norm, more than"
                f" {largest:.2g}"
            )
        elif tolerance is None and not found.identical:  # steps may be so small that the norm says nothing
            before, now, right = (dict(state.tensors()) for state in (self._loaded, own, recorded))
            other = other_step(before, now, right, self.dtype, self.update.rounding)
            if other is not None:
                off = f"the {other.kind} should have moved by {other.moved:.3g}, and are off by {other.off:.3g}"
        if off is not None:
            since = max(recorded for recorded in self.recording.state_steps if recorded < step)
            raise ReplayError(
                f"the recorded run cannot be repeated: before step {step}, {off}. Perhaps training has used something"
                f" since step {since} that is not recorded: random numbers of a generator of its own, hooks or"
                " callbacks that change weights or gradients, a state outside of parameters and buffers, other code or"
                " data. Then train without it; TrainingRecorder(..., spacing=1) finds the very step. Or the device"
                " computes with other rounding, and training amplifies it"
            )
        return found


def describe_parameters(module: nn.Module) -> list[Any]:
    """Names and shapes of a module's parameters, in JSON's types."""
    return [[name, list(parameter.shape)] for name, parameter in named_parameters(module).items()]


def canonical_module_name(name: str) -> str:
    """The name of a submodule, without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
