"""A fleet that repeats one recorded run without the losses of some examples: the ground truth for this run."""

import copy
import os
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lightning_trak.checks import positive, require_tensor
from lightning_trak.compatibility import original_module
from lightning_trak.fingerprints import fingerprint, module_fingerprint
from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import fixed_output, require_alone
from lightning_trak.replay.coupling import warn_of_coupling
from lightning_trak.replay.losses import Losses, training_losses
from lightning_trak.replay.player import Player
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.reweighted import Reweighted
from lightning_trak.retraining.fleets.members import Member, MemberStore, not_finite
from lightning_trak.retraining.fleets.subsets import checked_masks
from lightning_trak.retraining.training.stacked_run import StackedRun
from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.content import sample_digest
from lightning_trak.running.data.loading import num_examples
from lightning_trak.running.data.sources import Data, datamodule_of, single_loader
from lightning_trak.running.environment import rounding_of
from lightning_trak.running.parts import Part, share
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.strategies import require_whole_parameters
from lightning_trak.running.trainers import trainer_of
from lightning_trak.storage.paths import local_directory
from lightning_trak.texts.display import Displayed


class RecordedFleet(Displayed):
    """Repeats a recorded run once for each mask, with weight 0 on the losses of the examples that the mask leaves out.

    Seed, order, batches and random numbers are those of the recording, and the losses of a batch are divided by its
    recorded size. So members differ in nothing but the examples that are taken away. This is the ground truth for
    scores about one run, such as those of :class:`~lightning_trak.methods.Metagradient`. The truth for other seeds is
    that of :class:`RetrainingFleet`.

    An example with weight 0 is still in its batch. If the losses of others depend on it, members do not show what its
    removal from the data does, and a warning says so.

    Members are files, as those of :class:`RetrainingFleet` are, and are read by the same functions. All members of a
    fleet are trained on one kind of hardware, with one version of torch: on other hardware, outputs move by rounding
    that training amplifies, and this can be as large as what removing examples does.

    Args:
        directory: where members are kept, on a disk that all processes see. It may hold members from earlier runs.
        model: the LightningModule that was trained, or one of the same class and options. Its weights do not matter.
        recording: the directory of a :class:`~lightning_trak.TrainingRecorder`.
        trainer: any Trainer of one process. Its device is used, and it is left as it was. None: a GPU if there is one.
        train: the training data, as they were recorded.
        targets: where outputs are kept. Each target is computed alone, in eval mode.
        masks: bool ``(num_members, num_train)``, false where an example's loss gets weight 0; see
            :func:`~lightning_trak.retraining.random_removals`.
        output: the output to keep; default: the model's ``configure_model_output()``.
        losses: as for :class:`~lightning_trak.methods.Metagradient`.
        overwrite: as for :class:`RetrainingFleet`.

    Attributes:
        masks: as given.

    Raises:
        FileNotFoundError: if there is no recording.
        TypeError: if the model declares no output, or one that depends on other training examples.
        ValueError: if the recording is not finished or was altered, if the model or the training data are not those of
            the recording, or if the masks do not fit.

    Example::

        masks = random_removals(len(train), num_subsets=50, fraction=0.01)
        fleet = RecordedFleet(
            "run/one_run", model, "run/recording", trainer, train_loader, targets, masks
        )
        fleet.run(together=25)
        method = Metagradient(model, "run/recording")
        lds = fleet.lds(method.attribute(trainer, train_loader, targets))
        print(lds.compute(), lds.interval())
    """

    _shown = ("directory", "masks", "output")

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: nn.Module,
        recording: str | os.PathLike[str],
        trainer: L.Trainer | None,
        train: Data,
        targets: Data,
        masks: Tensor,
        *,
        output: ModelOutput | None = None,
        losses: Callable[[nn.Module, Any], Tensor] | None = None,
        overwrite: bool = False,
    ) -> None:
        trainer = trainer_of(trainer)
        require_whole_parameters(trainer)
        if trainer.world_size > 1:
            raise ValueError(
                f"the Trainer has {trainer.world_size} processes, but one process trains a member: use devices=1, and"
                ' divide the members among processes by run(part="1/2") and run(part="2/2")'
            )
        self.directory = local_directory(directory, "fleet")
        self._overwrite = overwrite
        module = original_module(model)
        self.output = copy.deepcopy(fixed_output(module, output))
        require_alone(self.output)
        recorded = Recording(recording)
        recorded.require_finished()
        self._device = trainer.strategy.root_device
        with isolated_random_states(), torch.inference_mode(False):
            loader = single_loader(train, "fit", trainer)
            self._targets = single_loader(targets, "predict", trainer)
            self._target_module = datamodule_of(targets)
            player = Player(module, recorded, loader, datamodule_of(train), self._device)
            self._run = Reweighted(player, training_losses(player, self.output, losses))
            self.masks = checked_masks(masks, self._run.num_train)
            self._environment = rounding_of(self._device)
            self._identity = self._describe(module, recorded, losses)
        if self._identity["targets"] is None:
            raise ValueError("targets are not the same when they are loaded again; give them without augmentation")

    def _describe(self, module: nn.Module, recorded: Recording, losses: Losses | None) -> dict[str, Any]:
        """What makes two fleets the same."""
        return {
            "recording": {
                "id": recorded.manifest["id"],
                "content": {part["file"]: part["sha256"] for part in recorded.manifest["parts"]},
            },
            "num_subsets": len(self.masks),
            "num_train": self._run.num_train,
            "num_targets": num_examples(self._targets),
            "train": recorded.run["data"],
            "targets": sample_digest(self._targets),
            "output": self.output.fingerprint(),
            "losses": None if losses is None else fingerprint(losses),
            "module": module_fingerprint(module, training=True),
            "environment": self._environment,
        }

    @cached_property
    def store(self) -> MemberStore:
        """The members on disk.

        Raises:
            ValueError: if the directory holds a fleet of another run, other data, masks, hardware or versions, naming
                the first difference.
        """
        return MemberStore(self.directory, self._identity, self.masks, overwrite=self._overwrite)

    @property
    def outputs(self) -> Tensor:
        """Outputs at the targets of all members, float32 ``(num_targets, num_members, 1)``.

        Raises:
            RuntimeError: if members are missing, naming them.
            ValueError: if a member was altered, or was made elsewhere: by another fleet, hardware or version.
        """
        return self.store.outputs(1)

    def lds(self, scores: Tensor) -> LinearDatamodelingScore:
        """The linear datamodeling score of some scores for this run.

        Args:
            scores: ``(num_targets, num_train)``.

        Returns:
            A metric with ``compute()``, ``interval()`` and ``per_target()``.

        Raises:
            RuntimeError: if members are missing.
            ValueError: if the scores have another shape or are not finite.
        """
        require_tensor("scores", scores)
        metric = LinearDatamodelingScore(self.masks)
        metric.update(scores.cpu(), self.outputs)
        return metric

    def run(self, part: Part | None = None, *, together: int | None = None, progress_bar: bool = True) -> None:
        """Train the members that are missing; continues where it was interrupted.

        Before the first member, the recorded run is repeated and compared with the recording, and the losses with what
        ``training_step`` returns. This takes about as long as three members.

        Args:
            part: ``"3/16"`` or ``(3, 16)``: the third of sixteen parts of the fleet; default: all of it. Processes may
                run different parts at once.
            together: train this many members at once, by ``torch.func.vmap``, which is many times as fast for small
                models. Outputs are the same up to rounding.
            progress_bar: whether to show one.

        Raises:
            RuntimeError: at the end, if members failed, naming them. All others are then finished.
            ValueError: if the part does not exist, the run cannot be repeated, or the losses are not those of training.
            TypeError: if the optimizer cannot train members together.
        """
        size = 1 if together is None else positive("together", together)
        members = share([Member(number, 0) for number in range(len(self.masks))], part)
        # Groups do not depend on which members are missing, so that each is trained with the same others, to the same
        # bits, however often the run is interrupted.
        groups = chunked(members, size)
        if not self.store.missing(members):
            return
        with isolated_random_states(), torch.inference_mode(False):
            self._warn()
            self._run.skipped()
            with tqdm(total=len(members), desc="Repeating", disable=not progress_bar) as bar:
                for group in groups:
                    if self.store.missing(group):
                        self._train(group, together is not None)
                    bar.update(len(group))
        self.store.require_trained(members)

    def _train(self, group: list[Member], together: bool) -> None:
        weights = self.masks[[member.subset for member in group]].float()
        if together:
            stack = StackedRun(self._run, weights)
            stack.train()
            rows = list(stack.outputs(self.output, self._targets, self._target_module))
        else:
            self._run.train(weights[0])
            rows = [self._run.outputs(self.output, self._targets, self._target_module, finite=False)]
        record = {"environment": self._environment, "together": len(group)}
        for member, row in zip(group, rows, strict=True):
            if member in self.store:
                continue
            error = not_finite(row)
            if error:
                self.store.record_failure(member, error)
            else:
                self.store.write(member, row, record)

    def _warn(self) -> None:
        warn_of_coupling(self._run.player, self._run.losses, "members show", 3)
        recorded = self._run.recording.manifest["environments"][-1]
        names = ("torch", "device", "hardware")
        there, here = ([environment.get(name) for name in names] for environment in (recorded, self._environment))
        if there != here:
            warnings.warn(
                f"the run was recorded with torch {there[0]} on {there[1]} ({there[2]}), and is repeated with torch"
                f" {here[0]} on {here[1]} ({here[2]}): scores and members describe the run as it is repeated",
                stacklevel=3,
            )
