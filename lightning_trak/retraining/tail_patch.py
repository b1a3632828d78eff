"""The tail patch: does one more step of training on what scores name raise the output at the target?"""

import copy
import math
import warnings
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
from lightning_trak.compatibility import original_module
from lightning_trak.gradients.leaves import require_own_leaves
from lightning_trak.gradients.precision import WorkingPrecision
from lightning_trak.gradients.soundness import require_repeatable, trying
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, unchanged
from lightning_trak.outputs.mixin import declared_output
from lightning_trak.retraining.estimates import Estimate, mean_of
from lightning_trak.retraining.removal import ranked, require_scores
from lightning_trak.retraining.training import NO_TRAINER_WARNING, training_loss
from lightning_trak.running.batches import TransferHooks, on_device
from lightning_trak.running.loaders import as_loader
from lightning_trak.running.loading import load
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.texts.tables import Table


@dataclass(frozen=True)
class TailPatch:
    """How far outputs rise by a step of training on the proponents that each method names.

    Attributes:
        methods: names of the methods.
        rises: in units of the output, float64 ``(num_methods, num_targets)``.
    """

    methods: tuple[str, ...]
    rises: Tensor

    def rise(self, confidence: float = 0.95, num_bootstraps: int = 2000, seed: int = 0) -> Estimate:
        """The mean rise over targets, shapes ``(num_methods,)``.

        Intervals, here and in :meth:`lead`, are by :func:`~lightning_trak.metrics.functional.bootstrap_interval`.
        """
        return mean_of(self.rises, confidence, num_bootstraps, seed)

    def lead(self, method: str, confidence: float = 0.95, num_bootstraps: int = 2000, seed: int = 0) -> Estimate:
        """How much more the outputs rise for one method than for each, target by target; shapes ``(num_methods,)``."""
        return mean_of(self.rises[self.methods.index(method)] - self.rises, confidence, num_bootstraps, seed)

    def table(self, method: str | None = None) -> Table:
        """A row for each method, with intervals.

        Args:
            method: one to compare with all others, in a further column.
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
    """Train a copy of the model for one more step on the strongest proponents of a target, and see its output rise.

    It asks what one step does, not what a whole training would have done without the examples
    (:class:`~lightning_trak.retraining.Counterfactuals`). So it takes no retraining, and serves models that nobody can
    train twice (Chang et al. 2024, arXiv 2410.17413, who introduce it).

    A step is the module's ``training_step``, ``backward`` and the optimizer's ``step``; a Trainer's gradient clipping
    and mixed precision, and hooks of module and callbacks, take no part. Everything runs on the module's device, in the
    precision of its weights but in float32 at least, and in eval mode, so that dropout adds no noise. Module, optimizer
    and random state are left as they are.

    Args:
        module: the trained module.
        optimizer: of this module, as training left it, since its moments and learning rate make the step: after
            ``fit``, ``trainer.optimizers[0]``. If a scheduler has decayed the learning rate to zero, set another.
        train: the whole training set, a map-style Dataset, or a DataLoader, whose collate function makes the batches.
        targets: alike, best some dozens. They are kept in memory.
        scores: ``(num_targets, num_train)`` for each method by name. Give random ones, too
            (:class:`~lightning_trak.methods.RandomScores`): a step on any examples changes the output.
        k: how many proponents.
        jointly: take one step on all ``k`` of them, rather than one on each of them alone, of whose rises the mean is
            taken, as its authors do.
        output: what should rise; default: the module's ``configure_model_output()``. For the log-probability, give
            :class:`~lightning_trak.outputs.NegativeLoss` a cross-entropy.
        progress_bar: whether to show one.

    Raises:
        ValueError: if scores, k and data do not fit, the optimizer has not this module's parameters or no learning
            rate, or an output is not finite, is random, or depends on weights of ``module`` rather than of its copy.
        TypeError: if the module optimizes by hand, or its output compares with training examples.

    Example::

        trainer.fit(model, train_loader)
        scores = {"TRAK": trak.score(trainer, targets), "random": RandomScores().attribute(trainer, train, targets)}
        print(tail_patch(model, trainer.optimizers[0], train_loader, targets, scores).table("TRAK").markdown())
    """
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    module, output = cast(L.LightningModule, original_module(module)), declared_output(module, output)
    train_loader, target_loader = as_loader(train), as_loader(targets)
    num_train, num_targets = (len(cast(Any, loader.dataset)) for loader in (train_loader, target_loader))
    require_scores(scores, num_targets, num_train)
    if not scores or not 0 < k <= num_train:
        raise ValueError(
            f"expected scores of some methods and a k of 1 to {num_train}, got {len(scores)} methods and k = {k}"
        )
    _require_step(module, optimizer, output)

    # What is to be trained on, and at which targets it is then asked for: many a step serves several.
    wanted: dict[tuple[int, ...], set[int]] = {}
    steps_of = []
    for values in scores.values():
        named = [tuple(row) for row in ranked(values.cpu(), k).tolist()]
        steps_of.append([[row] if jointly else [(index,) for index in row] for row in named])
        for target, steps in enumerate(steps_of[-1]):
            for step in steps:
                wanted.setdefault(step, set()).add(target)

    patch = _Patch(module, optimizer, output)
    rises: dict[tuple[tuple[int, ...], int], float] = {}
    with isolated_random_states(), warnings.catch_warnings(), torch.enable_grad():
        warnings.filterwarnings("ignore", NO_TRAINER_WARNING)
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


def _require_step(module: L.LightningModule, optimizer: Optimizer, output: ModelOutput) -> None:
    if not module.automatic_optimization:
        raise TypeError(f"{type(module).__name__} optimizes by hand: what a step of it is, only a Trainer can say")
    if output.context_size:
        raise TypeError(f"{type(output).__name__} compares with training examples; give an output of its own, output=")
    own = set(module.parameters())
    if not all(parameter in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"the {type(optimizer).__name__} has parameters that this {type(module).__name__} has not; give the"
            " optimizer that trained it, such as trainer.optimizers[0]"
        )
    if not any(float(group["lr"]) for group in optimizer.param_groups if "lr" in group):
        raise ValueError(
            "the optimizer's learning rate is 0, as a scheduler may have left it, so that a step changes nothing; set"
            ' group["lr"] of its param_groups to that of the training'
        )


class _Patch:
    """A copy of module and optimizer that takes steps, each from where training ended."""

    def __init__(self, module: L.LightningModule, optimizer: Optimizer, output: ModelOutput) -> None:
        self.output = output
        self.module = cast(L.LightningModule, copy_module(module, configure=False)).eval()
        self.precision = WorkingPrecision(self.module)
        # The copy of the optimizer is to have the parameters of the module's copy.
        pairs = zip(module.parameters(), self.module.parameters(), strict=True)
        self.optimizer = copy.deepcopy(optimizer, {id(old): new for old, new in pairs})
        self.original = Original(self.module, everything=True)
        self.state = copy.deepcopy(self.optimizer.state_dict())

    def on_device(self, batches: DataLoader[Any]) -> Iterator[Any]:
        return on_device(batches, self.module.device, self.precision.convert_input, TransferHooks(self.module))

    def step(self, batch: Any) -> None:
        self.original.restore()
        self.optimizer.load_state_dict(copy.deepcopy(self.state))  # what is loaded is not copied, but written to
        self.optimizer.zero_grad()
        with self._computing():
            loss = training_loss(self.module, batch)
        require_own_leaves(loss, self.module)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    @torch.no_grad()
    def output_at(self, batch: Any, target: int) -> float:
        value = float(self._output(batch))
        if not torch.isfinite(torch.tensor(value)):
            raise ValueError(f"the output at target {target} is {value}; leave it out, or train it less")
        return value

    @torch.no_grad()
    def require_sound_output(self, original: nn.Module, batch: Any) -> None:
        with trying(original, self.module):
            require_repeatable(lambda: self._output(batch), f"the output of {type(original).__name__}")

    def _output(self, batch: Any) -> Tensor:
        with self._computing():
            return self.output.output(self.module, copy.deepcopy(batch))  # it is asked again after each step

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with self.precision.active(), exact_attention(), unchanged(self.module):
            yield
