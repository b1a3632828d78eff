"""Data Shapley: an example's average contribution as the training set grows in random orders."""

import math
import random
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import lightning as L
import numpy as np
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset
from typing_extensions import override

from lightning_trak.checks import positive, real, require_factory, whole_seed
from lightning_trak.methods.base import MatrixMethod
from lightning_trak.methods.examples import Examples, Rows, declared_rows
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import declared_output
from lightning_trak.packages import overrides
from lightning_trak.running.batches import TRANSFER_HOOKS
from lightning_trak.running.data.loaders import like
from lightning_trak.running.data.loading import batch_size_of
from lightning_trak.running.data.sources import Data
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.trainers import first_batches_alone, trainer_of


class DataShapley(MatrixMethod):
    r"""How much does the training example add to the utility at the target, on average over smaller training sets?

    A positive score says that training on the example raises the utility, which by default is the output at the target.
    The unit is that of the utility: a score is the mean change when the example joins the training set. This is the
    truncated Monte Carlo estimate of Shapley values (Ghorbani and Zou 2019, arXiv 1904.02868, algorithm 1).

    The utility v(S) of a set of training examples is the output at the target of a module trained from scratch on S.
    Every S has the same initialisation and random numbers, so that v is a function of S; v of the empty set is the
    utility of the fresh module. A set grows in random order; an example's value is v after it joined minus v before,
    averaged over ``permutations`` orders: :math:`\tau_i = E[v(S \cup \{i\}) - v(S)]`. Without truncation a target's
    values add up to v(all) - v(empty), however few the orders.

    The Trainers of ``make_trainer`` say in which precision models are trained. Utilities are computed in that of the
    weights: in float32 after training in ``"bf16-mixed"``, in bfloat16 after ``"bf16-true"``.

    This trains up to ``permutations * num_train / step`` models, so it is for small data and cheap models. Under
    DDP the orders are shared out over the processes of the Trainer that ``attribute`` is given.

    Args:
        make_module: makes a new module to train, with weights of its own, at each call.
        make_trainer: makes a new Trainer of one process, which trains it, at each call.
        utility: ``(module, batch) -> (batch,)``; default: the output that the module declares
            (:class:`~lightning_trak.AttributionMixin`). Correctness, say, is
            ``lambda module, batch: (module(batch[0]).argmax(1) == batch[1]).float()``.
        permutations: the number of orders.
        step: how many examples join at a time; the change is shared equally among them, which is a coarser estimate
            from fewer models.
        tolerance: an order stops early once the utility is within this much of v(all) for every target, and the
            examples that are left count as no change. With 0 no order stops early.
        seed: of the orders, and of every training.

    Example::

        def make_trainer():
            return L.Trainer(max_epochs=5, logger=False)

        method = DataShapley(LitNet, make_trainer, permutations=20, step=10)
        values = method.attribute(trainer, train_loader, target_loader)
    """

    _shown = ("make_module", "permutations", "step", "tolerance", "seed")
    _without_output = "utility= says what is attributed"

    def __init__(
        self,
        make_module: Callable[[], L.LightningModule],
        make_trainer: Callable[[], L.Trainer],
        *,
        utility: Rows | None = None,
        permutations: int = 100,
        step: int = 1,
        tolerance: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not real("tolerance", tolerance) >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        require_factory("make_module", make_module)
        require_factory("make_trainer", make_trainer)
        self.make_module = make_module
        self.make_trainer = make_trainer
        self.utility = utility
        self.permutations = positive("permutations", permutations)
        self.step = positive("step", step)
        self.tolerance = tolerance
        self.seed = whole_seed("seed", seed)
        self._made: WeakValueDictionary[int, Any] = WeakValueDictionary()

    @property
    def output(self) -> ModelOutput | None:
        """The output that new modules declare; None where ``utility`` takes its place."""
        if self.utility is not None:
            return None
        with isolated_random_states():
            return declared_output(self.make_module(), otherwise="pass utility=")

    @property
    @override
    def meaning(self) -> str:
        return (
            "An example with a positive score raises the utility at the target, which by default is the model's output,"
            " on average over smaller training sets; one with a negative score lowers it."
        )

    def matrix(self, trainer: L.Trainer, train: Examples, targets: Examples) -> Tensor:
        """Estimated Shapley values; see :class:`~lightning_trak.methods.base.MatrixMethod`.

        Args:
            trainer: says which processes share the work; the Trainers of ``make_trainer`` do it.
            train: the training data; its loader's batch size, collate function, workers, and whether it shuffles are
                used for every subset. No batch is dropped.
            targets: the targets.

        Raises:
            ValueError: if a factory returns the same object, or the same weights, twice, or if subsets of the training
                data cannot be loaded as the whole is.
        """
        _require_divisible(train)
        total, ranks = len(train), Ranks.of(trainer)

        def utility(members: list[int]) -> Tensor:
            return self._retrain(train.loader, members, targets)

        models = self.permutations * (math.ceil(total / self.step) - 1) + 1
        most = "up to " if self.tolerance else ""
        rank_zero_info(f"DataShapley: {most}{models:,} models to train, nearly all on a part of the training set")
        orders = torch.Generator().manual_seed(self.seed)
        nothing, everything = utility([]), utility(list(range(total)))
        values = torch.zeros(len(targets), total, dtype=torch.float64)
        for number in range(self.permutations):
            order = torch.randperm(total, generator=orders).tolist()
            if number % ranks.world_size != ranks.rank:
                continue
            before = nothing
            for start in range(0, total, self.step):
                if (everything - before).abs().max() < self.tolerance:
                    break
                joining = order[start : start + self.step]
                members = order[: start + len(joining)]
                after = everything if len(members) == total else utility(sorted(members))
                values[:, joining] += ((after - before) / len(joining)).unsqueeze(1)
                before = after
        return (ranks.sum(values) / self.permutations).float()

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """The size of each example's value at itself; see :class:`~lightning_trak.methods.base.LabelStatistic`."""
        trainer = trainer_of(trainer)
        examples = Examples(train, "fit", trainer)
        return self.matrix(trainer, examples, examples).diagonal().abs()

    def _retrain(self, loader: DataLoader[Any], members: list[int], targets: Examples) -> Tensor:
        """Utility at each target of a model trained on the members, float64, ``(num_targets,)``."""
        with isolated_random_states():
            random.seed(self.seed)
            np.random.seed(self.seed)  # noqa: NPY002
            torch.manual_seed(self.seed)
            module, trainer = self.make_module(), self.make_trainer()
            self._require_new("make_module", module, *(part for part in module.parameters() if part.requires_grad))
            self._require_new("make_trainer", trainer)
            if trainer.world_size != 1:
                raise ValueError(
                    f"expected Trainers of one process from make_trainer, got one of {trainer.world_size}; the work is"
                    " shared out over the processes of the Trainer that attribute() is given"
                )
            setting = first_batches_alone(trainer)
            if setting is not None:
                raise ValueError(
                    f"make_trainer returned a Trainer with {setting}, which trains on the first batches of a subset"
                    " only: leave it out; max_epochs or max_steps make training shorter"
                )
            if members:
                trainer.fit(module, _subset(loader, members))
            else:
                module.configure_model()
            utility = self.utility or declared_rows(module, "pass utility=")
            values = targets.map(trainer, module, utility, "the utility").double()
        if values.ndim != 1:
            raise ValueError(f"expected one utility per example, shape (batch,), got rows of {tuple(values.shape[1:])}")
        return values

    def _require_new(self, factory: str, *things: Any) -> None:
        for thing in things:
            if self._made.get(id(thing)) is thing:
                what = "weights" if isinstance(thing, torch.nn.Parameter) else f"{type(thing).__name__} object"
                raise ValueError(
                    f"{factory} returned the same {what} twice, and it is trained already: make a new one at each call"
                )
            self._made[id(thing)] = thing


def _require_divisible(train: Examples) -> None:
    """Check that subsets of the data can be loaded as the whole is."""
    loader, datamodule = train.loader, train.datamodule
    if datamodule is not None:
        own = [hook for hook in TRANSFER_HOOKS if overrides(datamodule, hook, L.LightningDataModule)]
        if own:
            raise ValueError(
                f"{type(datamodule).__name__} has {own[0]}, which is not called for subsets of its data: move it to the"
                " LightningModule"
            )
    if not isinstance(loader.sampler, (SequentialSampler, RandomSampler)) or loader.batch_size is None:
        raise ValueError(
            "subsets of the training data are trained on in order or shuffled, but the loader has a"
            f" {type(loader.sampler if loader.batch_size else loader.batch_sampler).__name__}"
        )


def _subset(loader: DataLoader[Any], members: list[int]) -> DataLoader[Any]:
    shuffle = isinstance(loader.sampler, RandomSampler)
    return like(loader, Subset(loader.dataset, members), batch_size=batch_size_of(loader), shuffle=shuffle)
