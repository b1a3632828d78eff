"""The tail patch: how far one more training step on a target's proponents raises the output at the target."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lightning_trak.checkpoints.copies import Original, copy_module
from lightning_trak.checks import positive, require_bool, require_one_of
from lightning_trak.compatibility import original_module
from lightning_trak.gradients.leaves import require_own_leaves
from lightning_trak.gradients.precision import WorkingPrecision
from lightning_trak.gradients.trials import require_repeatable, trying
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, unchanged
from lightning_trak.outputs.mixin import fixed_output, require_alone
from lightning_trak.packages import is_a
from lightning_trak.retraining.estimates import Estimate, mean_of
from lightning_trak.retraining.proponents.masks import ranked, require_scores
from lightning_trak.running.batches import TransferHooks, on_device
from lightning_trak.running.data.loaders import as_loader
from lightning_trak.running.data.loading import load, num_examples
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.training_step import set_place, training_loss, without_trainer
from lightning_trak.texts.tables import Table

Step = tuple[int, ...]
"""Positions of the training examples that a step is taken on."""


@dataclass(frozen=True)
class TailPatch:
    """How far one training step on a method's proponents raises the outputs.

    Attributes:
        methods: names of the methods.
        rises: rises in units of the output, float64 ``(num_methods, num_targets)``. Positive: the output rises.
    """

    methods: tuple[str, ...]
    rises: Tensor

    def rise(self, confidence: float = 0.95, num_bootstraps: int = 2000, seed: int = 0) -> Estimate:
        """The mean rise over targets, shapes ``(num_methods,)``.

        The intervals here and in :meth:`lead` come from
        :func:`~lightning_trak.metrics.functional.bootstrap_interval`.
        """
        return mean_of(self.rises, confidence, num_bootstraps, seed)

    def lead(self, method: str, confidence: float = 0.95, num_bootstraps: int = 2000, seed: int = 0) -> Estimate:
        """The mean rise of one method minus that of each method, paired by target; shapes ``(num_methods,)``."""
        require_one_of("method", method, self.methods)
        return mean_of(self.rises[self.methods.index(method)] - self.rises, confidence, num_bootstraps, seed)

    def table(self, method: str | None = None) -> Table:
        """A table with a row for each method, with intervals.

        Args:
            method: a method to compare with all others, in one more column; default: no such column.
        """
        rise = self.rise()
        largest = float(rise.mean.abs().max())
        decimals = max(0, 2 - math.floor(math.log10(largest))) if largest else 2  # three digits of the largest
        form = f"+.{decimals}f"
        columns = [list(self.methods), [rise.written(form, row) for row in range(len(self.methods))]]
        names = ["method", "output rises by"]
        if method is not None:
            lead = self.lead(method)
            columns.append(["" if name == method else lead.written(form, row) for row, name in enumerate(self.methods)])
            names.append(f"that of {method} minus this")
        return Table(tuple(names), list(zip(*columns, strict=True)))


def tail_patch(
    module: L.LightningModule,
    optimizer: Optimizer,
    train: DataLoader[Any] | Dataset[Any],
    targets: DataLoader[Any] | Dataset[Any],
    scores: Mapping[str, Tensor],
    k: int = 10,
    *,
    jointly: bool = False,
    output: ModelOutput | None = None,
    progress_bar: bool = True,
) -> TailPatch:
    """Train a copy of the model for one more step on a target's strongest proponents, and measure the output's rise.

    It measures the effect of one step. It does not measure how a whole training without the examples would end;
    :class:`~lightning_trak.retraining.Counterfactuals` does. The tail patch needs no retraining, so it is also for
    models that are too expensive to train twice. The method is by Chang et al. 2024, arXiv 2410.17413.

    A step is the module's ``training_step``, ``backward`` and the optimizer's ``step``. It leaves out gradient clipping
    and mixed precision of a Trainer, and hooks of module and callbacks. Everything runs on the module's device, in the
    precision of its weights but in float32 at least, and in eval mode, so that dropout adds no noise. Module, optimizer
    and random state are not changed.

    Args:
        module: the trained module.
        optimizer: the optimizer of this module after training: after ``fit``, ``trainer.optimizers[0]``. Its moments
            and learning rate determine the step. If a scheduler has decayed the learning rate to zero, set another one.
        train: the whole training set: a map-style Dataset, or a DataLoader. The DataLoader's collate function makes the
            batches.
        targets: a Dataset or DataLoader like ``train``, best with a few dozen targets. They are kept in memory.
        scores: name of each method -> its scores ``(num_targets, num_train)``. Include random scores
            (:class:`~lightning_trak.methods.RandomScores`) to compare with, since any step changes the output.
        k: the number of proponents.
        jointly: True: take one step on all ``k`` proponents together. False: take one step on each of them alone and
            average the rises, as the authors do.
        output: the output to measure; default: the module's ``configure_model_output()``. For the log-probability, use
            :class:`~lightning_trak.outputs.NegativeLoss` with a cross-entropy.
        progress_bar: whether to show a progress bar.

    Raises:
        ValueError: if scores, k and data do not fit together; if the optimizer has parameters of another module, or a
            learning rate of 0; or if an output is not finite, is random, or depends on weights of ``module`` and not of
            its copy.
        TypeError: if the module uses manual optimization, or if its output compares with training examples.

    Example::

        trainer.fit(model, train_loader)
        scores = {
            "TRAK": trak.score(trainer, targets),
            "random": RandomScores().attribute(trainer, train, targets),
        }
        optimizer = trainer.optimizers[0]
        patch = tail_patch(model, optimizer, train_loader, targets, scores)
        print(patch.table("TRAK").markdown())
    """
    if is_a(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    module, output = cast(L.LightningModule, original_module(module)), fixed_output(module, output)
    train_loader, target_loader = as_loader(train), as_loader(targets)
    num_train, num_targets = (num_examples(loader) for loader in (train_loader, target_loader))
    require_scores(scores, num_targets, num_train)
    require_bool("jointly", jointly)
    if not scores or positive("k", k) > num_train:
        raise ValueError(
            f"expected scores of at least one method and a k of 1 to {num_train}, got {len(scores)} methods and k = {k}"
        )
    _require_step(module, optimizer, output)
    steps_of = [_steps(values, k, jointly) for values in scores.values()]
    wanted: dict[Step, set[int]] = {}  # the targets to evaluate after each step; several may share it
    for of_method in steps_of:
        for target, steps in enumerate(of_method):
            for step in steps:
                wanted.setdefault(step, set()).add(target)

    patch = _Patch(module, optimizer, output)
    rises: dict[tuple[Step, int], float] = {}
    with isolated_random_states(), torch.enable_grad():
        alone = load(target_loader, [[target] for target in range(num_targets)])
        asked = list(patch.on_device(alone))
        if asked:
            patch.require_sound_output(module, asked[0])
        before = [patch.output_at(batch, target) for target, batch in enumerate(asked)]
        batches = patch.on_device(load(train_loader, wanted))
        for (step, places), batch in zip(
            tqdm(wanted.items(), desc="Tail patch", disable=not progress_bar), batches, strict=True
        ):
            patch.step(batch)
            for target in places:
                rises[step, target] = patch.output_at(asked[target], target) - before[target]
    found = [
        [[rises[step, target] for step in steps] for target, steps in enumerate(of_method)] for of_method in steps_of
    ]
    return TailPatch(tuple(scores), torch.tensor(found, dtype=torch.float64).mean(-1))


def _steps(scores: Tensor, k: int, jointly: bool) -> list[list[Step]]:
    """The steps to take for each target: one on all its ``k`` proponents, or one on each."""
    proponents = [tuple(row) for row in ranked(scores.cpu(), k).tolist()]
    return [[row] if jointly else [(index,) for index in row] for row in proponents]


def _require_step(module: L.LightningModule, optimizer: Optimizer, output: ModelOutput) -> None:
    if not module.automatic_optimization:
        raise TypeError(f"{type(module).__name__} uses manual optimization, so its step needs a Trainer")
    require_alone(output)
    if not isinstance(optimizer, Optimizer):
        kind = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
        raise TypeError(f"expected the optimizer that trained the module, such as trainer.optimizers[0], got {kind}")
    own = set(module.parameters())
    if not all(parameter in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the {type(optimizer).__name__} has parameters that are not in this {type(module).__name__}; pass the"
            " optimizer that trained it, such as trainer.optimizers[0]"
        )
    if not any(float(group["lr"]) for group in optimizer.param_groups if "lr" in group):
        raise ValueError(
            "the optimizer's learning rate is 0, perhaps because of a scheduler, so a step changes nothing; set"
            ' group["lr"] of its param_groups to a learning rate of the training'
        )


class _Patch:
    """A copy of module and optimizer that takes steps. Each step starts from the state at the end of training."""

    def __init__(self, module: L.LightningModule, optimizer: Optimizer, output: ModelOutput) -> None:
        self.output = output
        self.module = without_trainer(cast(L.LightningModule, copy_module(module, configure=False)).eval())
        set_place(self.module, module.current_epoch, module.global_step)  # where training ended, if a Trainer is there
        self.precision = WorkingPrecision(self.module)
        # The copied optimizer gets the parameters of the copied module.
        pairs = zip(module.parameters(), self.module.parameters(), strict=True)
        self.optimizer = copy.deepcopy(optimizer, {id(old): new for old, new in pairs})
        self.original = Original(self.module, everything=True)
        self.state = copy.deepcopy(self.optimizer.state_dict())

    def on_device(self, batches: DataLoader[Any]) -> Iterator[Any]:
        return on_device(batches, self.module.device, self.precision.convert_input, TransferHooks(self.module))

    def step(self, batch: Any) -> None:
        self.original.restore()
        self.optimizer.load_state_dict(copy.deepcopy(self.state))  # it does not copy, and a step writes to the state
        self.optimizer.zero_grad()
        with self._computing():
            loss = training_loss(self.module, batch)
        require_own_leaves(loss, self.module)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    @torch.no_grad()
    def output_at(self, batch: Any, target: int) -> float:
        value = float(self._output(batch))
        if not math.isfinite(value):
            raise ValueError(f"the output at target {target} is {value}; leave the target out, or train the model less")
        return value

    @torch.no_grad()
    def require_sound_output(self, original: nn.Module, batch: Any) -> None:
        with trying(original, self.module):
            require_repeatable(lambda: self._output(batch), f"the output of {type(original).__name__}")

    def _output(self, batch: Any) -> Tensor:
        with self._computing():
            return self.output.output(self.module, copy.deepcopy(batch))  # the batch is used again after each step

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self.precision.active(), exact_attention(), unchanged(self.module):
            yield
