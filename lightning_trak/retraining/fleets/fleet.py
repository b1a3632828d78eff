"""A fleet of models, each trained afresh on a subset of the training data: the ground truth of attribution."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning as L
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from lightning_trak.checks import integer, positive, require_bool, require_factory, whole_seed
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import fixed_output
from lightning_trak.packages import is_a
from lightning_trak.retraining.fleets.ensembles import FleetSplit, split_members
from lightning_trak.retraining.fleets.identity import describe_loader, describe_module, describe_trainer
from lightning_trak.retraining.fleets.members import Member, MemberStore, not_finite
from lightning_trak.retraining.fleets.subsets import checked_masks
from lightning_trak.retraining.training.alone import (
    FactoryError,
    NothingTwice,
    joined,
    outputs_of,
    require_own_seed,
    seeded,
    shuffled_like,
    train_alone,
)
from lightning_trak.retraining.training.left_out import require_trainable_together
from lightning_trak.retraining.training.together import train_together
from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.content import fingerprint
from lightning_trak.running.data.loaders import WITHOUT_DATAMODULE, as_loader
from lightning_trak.running.data.loading import batch_size_of, load, num_examples, sample_batches
from lightning_trak.running.data.ordering import require_order
from lightning_trak.running.parts import Part, share
from lightning_trak.running.threads import compute_threads
from lightning_trak.running.trainers import quiet
from lightning_trak.storage.paths import local_directory
from lightning_trak.texts.display import Displayed


class _Trained(NamedTuple):
    """What training leaves of a group of members.

    Attributes:
        outputs: ``(members, num_targets)``.
        record: of the training, in JSON's types.
        weights: the state dict of each member; None if it is not kept.
    """

    outputs: Tensor
    record: dict[str, Any]
    weights: Sequence[dict[str, Any] | None]


class RetrainingFleet(Displayed):
    """Trains a new model on each subset, several times if asked to, and keeps its outputs at the targets.

    Every member has a new module, a new Trainer, and a seed of its own for its initialisation and the order of its
    data. This seed depends on nothing but the fleet's seed and the member. So it does not matter which process trains a
    member, when, or how often the run is stopped. The user's random state is left alone.

    Args:
        directory: where members are kept, on a disk that all processes see. It may hold members from earlier runs.
        make_module: makes a new LightningModule in each call. Pretrained weights must not have seen ``train``.
        make_trainer: makes a new Trainer of one process in each call, with new callbacks. Switch its progress bar,
            logger and checkpoints off unless you want them for each member. If a callback or a scheduler needs
            validation data, such as EarlyStopping, give the module a ``val_dataloader()``. One Trainer and two modules
            more are made at the start, to record their settings.
        train: the whole training set: a map-style Dataset, or a DataLoader over it.
        targets: where outputs are kept: a Dataset or DataLoader; outputs are in the order of its dataset.
        masks: bool ``(num_subsets, num_train)``, true where a subset holds the example; see
            :func:`~lightning_trak.retraining.random_subsets`.
        num_seeds: how many models are trained on each subset. It can be raised when the fleet is run again.
        seed: of the fleet.
        output: the output to keep; default: the module's ``configure_model_output()``.
        make_loader: makes the loader of a subset, a Dataset, for training. Default: one with the batch size (32 for a
            Dataset), collate function, workers and ``drop_last`` of ``train``, always in random order.
        keep_weights: whether to keep the final weights of each member, so that :meth:`split` can make checkpoints of
            them. Members of a fleet that ran without are trained again, to the same outputs.
        overwrite: whether to delete the members of another fleet that the directory holds. A fleet with the same
            settings is continued. Other files stay, and so does a fleet that another process uses.

    Attributes:
        masks: as given.
        store: the members on disk.

    Raises:
        ValueError: if the masks do not fit the training set, or a factory returns what cannot be trained, or sets the
            random seed.
        TypeError: if the data, the output or a factory have a wrong type.

    Example::

        masks = random_subsets(len(train), num_subsets=100)
        fleet = RetrainingFleet(
            "run/fleet", LitNet, make_trainer, train_loader, targets, masks, num_seeds=3
        )
        fleet.run()  # in each of 16 processes: run(part="1/16") to run(part="16/16")
        lds = LinearDatamodelingScore(fleet.masks)
        lds.update(scores, fleet.outputs)
    """

    _shown = ("directory", "make_module", "masks", "num_seeds", "seed", "output")

    def __init__(
        self,
        directory: str | Path,
        make_module: Callable[[], L.LightningModule],
        make_trainer: Callable[[], L.Trainer],
        train: DataLoader[Any] | Dataset[Any],
        targets: DataLoader[Any] | Dataset[Any],
        masks: Tensor,
        *,
        num_seeds: int = 1,
        seed: int = 0,
        output: ModelOutput | None = None,
        make_loader: Callable[[Dataset[Any]], DataLoader[Any]] | None = None,
        keep_weights: bool = False,
        overwrite: bool = False,
    ) -> None:
        require_factory("make_module", make_module)
        require_factory("make_trainer", make_trainer)
        self.directory = local_directory(directory, "fleet")
        self.make_module = make_module
        self.make_trainer = make_trainer
        self.num_seeds = positive("num_seeds", num_seeds)
        self.seed = seed = whole_seed("seed", seed)
        require_bool("keep_weights", keep_weights)
        self.keep_weights = keep_weights
        self._overwrite = overwrite
        self._nothing_twice = NothingTwice()
        with seeded(seed), quiet():
            module, trainer = self._new_module(), self._new_trainer()
            require_own_seed(seed)
        with seeded(seed + 1), quiet():
            again = make_module()
            require_own_seed(seed + 1)
        self._train = _one_loader("train", train)
        self._targets = _one_loader("targets", targets)
        require_order(self._targets, "the targets")
        self.masks = checked_masks(masks, num_examples(self._train))
        if make_loader is not None:
            require_factory("make_loader", make_loader)
        self._users_make_loader = make_loader
        self.make_loader = make_loader if make_loader is not None else shuffled_like(self._train)
        self.output = copy.deepcopy(fixed_output(module, output))
        self._identity = self._describe(module, trainer) | describe_module(module, again, make_module, trainer)
        # Members have consecutive seeds, so that no two share one; the first may be any fixed number.
        self._first_seed = random.Random(f"fleet {seed}").getrandbits(32)

    def _describe(self, module: L.LightningModule, trainer: L.Trainer) -> dict[str, Any]:
        with warnings.catch_warnings():  # training data may be augmented at random
            warnings.filterwarnings("ignore", "items of the training data are not the same twice")
            train = fingerprint(self._train, "the training data")
        loader = self._loader_of(0)
        return {
            "seed": self.seed,
            "num_subsets": len(self.masks),
            "num_train": self.masks.shape[1],
            "num_targets": num_examples(self._targets),
            "train": train,
            "targets": fingerprint(self._targets, "the targets"),
            "output": self.output.fingerprint(),
            "parameters": [[name, list(parameter.shape)] for name, parameter in module.named_parameters()],
            "batch_size": batch_size_of(loader),
            "loader": describe_loader(loader, self._users_make_loader),
            **describe_trainer(trainer),
        }

    @cached_property
    def store(self) -> MemberStore:
        """The members on disk.

        Raises:
            ValueError: if the directory holds a fleet of other data, subsets or settings, naming the first difference.
        """
        settings = {"keeps_weights": self.keep_weights, "overwrite": self._overwrite}
        return MemberStore(self.directory, self._identity, self.masks, **settings)

    @property
    def outputs(self) -> Tensor:
        """Outputs at the targets of all members, float32 ``(num_targets, num_subsets, num_seeds)``.

        Raises:
            RuntimeError: if members are missing, naming them, and which of them failed.
        """
        return self.store.outputs(self.num_seeds)

    def split(self, num_subsets: int, num_seeds: int = 1) -> FleetSplit:
        """Split the fleet into checkpoints for attribution, and the ground truth to measure the scores on.

        See :func:`~lightning_trak.retraining.split_fleet`.

        Args:
            num_subsets: how many subsets give checkpoints.
            num_seeds: how many models of each of these subsets.
        """
        return split_members(self.store, num_subsets, num_seeds, self.outputs)

    def run(
        self, part: Part | None = None, *, together: int | None = None, retries: int = 1, progress_bar: bool = True
    ) -> None:
        """Train the members that are missing; continues where it was interrupted.

        Processes may run different parts at once. If another process has begun the same part, the members that it has
        finished are not trained again.

        Args:
            part: ``"3/16"`` or ``(3, 16)``: the third of sixteen parts of the fleet; default: all of it.
            together: train this many members at once, by :func:`~lightning_trak.retraining.train_together`: for small
                modules whose training is their ``training_step`` and optimizer alone. Only the
                device and ``max_epochs`` of the Trainer are then used. Such members start from the same weights as
                members trained one at a time, but with another order of their data, so that the two agree in
                distribution. To get the same bits, continue with the same number and parts: a missing member is then
                trained together with the same others.
            retries: how often a member that failed is tried again, after all others. Calling ``run`` again tries all
                missing members again.
            progress_bar: whether to show one.

        Raises:
            RuntimeError: at the end, if members failed, naming them. All others are then finished. Tracebacks are in
                the folder ``failures``.
            ValueError: if the part does not exist; if a factory returns the same object twice; if a factory or a hook
                sets the random seed; if the output is not one number per target; or if members are to be trained
                together on items that are augmented at random.
            TypeError: if training members together would leave out something that a Trainer does, naming it.
        """
        if integer("retries", retries) < 0:
            raise ValueError(f"retries must be at least 0, got {retries}")
        members = share([Member(s, r) for r in range(self.num_seeds) for s in range(len(self.masks))], part)
        if together is not None:
            together = positive("together", together)
            self._require_trainable_together()
        missing = set(self.store.missing(members))
        done = len(members) - len(missing)
        with tqdm(total=len(members), initial=done, desc="Retraining", disable=not progress_bar) as bar, quiet():
            for _ in range(1 + retries):
                for group in self._groups(members, together or 1):
                    if self.store.missing(group):  # another process may have trained some meanwhile
                        self._attempt(group, together is not None)
                    found = missing.intersection(group).difference(self.store.missing(group))
                    missing -= found
                    bar.update(len(found))
        self.store.require_trained(members)

    def _groups(self, members: list[Member], size: int) -> Iterator[list[Member]]:
        """Members to be trained at once: on subsets of one size, which training together requires.

        Groups do not depend on which members are missing. So a missing member is trained together with the same others,
        to the same bits, however often the run is interrupted.
        """
        if size > 1:
            members = sorted(members, key=self._subset_size)
        for _, alike in groupby(members, self._subset_size):
            yield from chunked(list(alike), size)

    def _subset_size(self, member: Member) -> int:
        return int(self.masks[member.subset].sum())

    def _attempt(self, group: list[Member], together: bool) -> None:
        try:
            outputs, record, weights = self._train_together(group) if together else self._train_alone(group[0])
        except FactoryError:
            raise
        except Exception as error:  # one member's error must not stop the others
            for member in self.store.missing(group):
                self._failed(member, error)
            return
        missing = self.store.missing(group)

        def keep(member: Member, row: Tensor, state: dict[str, Any] | None) -> None:
            if member not in missing:
                return
            error = not_finite(row)
            if error:
                self._failed(member, error)
            else:
                self.store.write(member, row, record | {"seed": self._seed_of(member)}, state)

        with compute_threads() as threads:  # waiting for the disk takes the time
            list(threads.map(keep, group, outputs, weights))

    def _failed(self, member: Member, error: Exception) -> None:
        self.store.record_failure(member, error)
        rank_zero_warn(f"Retraining: {member} failed: {type(error).__name__}: {error}")

    def _seed_of(self, member: Member) -> int:
        return (self._first_seed + member.repetition * len(self.masks) + member.subset) % 2**32

    def _new_module(self) -> L.LightningModule:
        return self._nothing_twice.module(self.make_module())

    def _new_trainer(self) -> L.Trainer:
        return self._nothing_twice.trainer(self.make_trainer())

    def _subset(self, subset: int) -> Subset[Any]:
        return Subset(self._train.dataset, self.masks[subset].nonzero().flatten().tolist())

    def _loader_of(self, subset: int) -> DataLoader[Any]:
        loader = self.make_loader(self._subset(subset))
        if not isinstance(loader, DataLoader):
            raise FactoryError(f"make_loader() must return a DataLoader, got {type(loader).__name__}")
        if loader.dataset is self._train.dataset:
            raise FactoryError(
                "make_loader() returned a loader of the whole training set, so all members would be trained on all"
                " examples; make a loader of the dataset that is passed to it, which is the subset"
            )
        self._nothing_twice.loader(loader)
        return loader

    def _train_alone(self, member: Member) -> _Trained:
        seed = self._seed_of(member)
        with seeded(seed):
            module, trainer = self._new_module(), self._new_trainer()
            record = train_alone(module, trainer, self._loader_of(member.subset), seed)
            device = trainer.strategy.root_device
            # Copied, because half weights become float32 when the outputs are computed.
            weights = copy.deepcopy(module.state_dict()) if self.keep_weights else None
            outputs = outputs_of(module, self.output, self._target_batches(), self._context_batches(), device)
        return _Trained(outputs[None], record | {"together": 1}, [weights])

    def _train_together(self, group: list[Member]) -> _Trained:
        with seeded(self.seed):
            trainer, loader = self._new_trainer(), self._loader_of(group[0].subset)
            device, max_epochs = trainer.strategy.root_device, cast(int, trainer.max_epochs)
            stack = train_together(
                self._new_module,
                self._train.dataset,
                self.masks[[member.subset for member in group]],
                [self._seed_of(member) for member in group],
                max_epochs=max_epochs,
                batch_size=cast(int, loader.batch_size),
                device=device,
            )
            batches = (move_data_to_device(batch, device) for batch in self._target_batches())
            found = [stack.outputs(self.output, batch).float().cpu() for batch in batches]
            outputs = joined(found, self.output, (len(group), num_examples(self._targets)))
        record = {"steps": max_epochs * len(loader), "epochs": max_epochs, "together": len(group)}
        weights = stack.state_dicts() if self.keep_weights else [None] * len(group)
        return _Trained(outputs, record, weights)

    def _require_trainable_together(self) -> None:
        if self.output.context_size:
            raise TypeError(
                f"{type(self.output).__name__} compares with training examples, whose context is made for one module"
                " at a time; train without together="
            )
        with seeded(self.seed), quiet():
            require_trainable_together(self._new_module(), self._new_trainer(), self._loader_of(0), self._subset(0))

    def _target_batches(self) -> DataLoader[Any]:
        positions = range(num_examples(self._targets))
        return load(self._targets, chunked(positions, batch_size_of(self._targets)))

    def _context_batches(self) -> DataLoader[Any]:
        """The same random training examples for every member, so that all members have the same output."""
        return load(self._train, sample_batches(self._train, self.output.context_size, f"{self.seed}/context"))


def _one_loader(name: str, data: Any) -> DataLoader[Any]:
    if not isinstance(data, (DataLoader, Dataset)):
        advice = f"; {WITHOUT_DATAMODULE}" if is_a(data, L.LightningDataModule) else ""
        raise TypeError(f"{name} must be a map-style Dataset or a DataLoader, got {type(data).__name__}{advice}")
    return as_loader(data)
