"""How far the outputs of one recorded run move without the strongest proponents of each target."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_trak.checks import positive, require_one_of
from lightning_trak.outputs import ModelOutput
from lightning_trak.retraining.estimates import Estimate, mean_of
from lightning_trak.retraining.fleets.recorded import RecordedFleet
from lightning_trak.retraining.fleets.subsets import random_removals
from lightning_trak.retraining.proponents.masks import removal_masks, require_scores
from lightning_trak.running.data.loading import num_examples
from lightning_trak.running.data.sources import Data, single_loader
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.trainers import trainer_of
from lightning_trak.texts.tables import Cell, Table


@dataclass(frozen=True)
class RemovalEffect:
    """Changes of outputs, or of losses, when examples are removed from one recorded run.

    Attributes:
        methods: names of the methods.
        removed: how many examples were removed.
        changes: without the strongest proponents of a target minus with all examples, float64 ``(num_methods,
            num_targets)``.
        random: the same without random examples, averaged over random sets, float64 ``(num_targets,)``.
    """

    methods: tuple[str, ...]
    removed: int
    changes: Tensor
    random: Tensor

    def change(self, confidence: float = 0.95) -> Estimate:
        """Mean change over targets of each method and, last, of random removal: shapes ``(num_methods + 1,)``.

        Its interval is a percentile bootstrap over targets, with the same draws for all.

        Args:
            confidence: of the interval, in (0, 1).
        """
        return mean_of(torch.cat([self.changes, self.random[None]]), confidence)

    def beyond_random(self, confidence: float = 0.95) -> Estimate:
        """Mean change of each method minus that of random removal, target by target: shapes ``(num_methods,)``.

        Args:
            confidence: of the interval, in (0, 1).
        """
        return mean_of(self.changes - self.random, confidence)

    def table(self) -> Table:
        """A row for each method, and one for random removal, with intervals."""
        change, beyond = self.change(), self.beyond_random()
        rows: list[tuple[Cell, ...]] = [
            (method, self.removed, change.written(".3g", row), beyond.written(".3g", row))
            for row, method in enumerate(self.methods)
        ]
        rows.append(("random examples", self.removed, change.written(".3g", len(self.methods)), ""))
        return Table(("method", "removed", "change", "beyond random removal"), rows)


class ProponentRemoval:
    """Repeats a recorded run without the strongest proponents of each target, as each method ranks them.

    The change of a target's loss is often called query loss difference (QLD). A method finds what the target depends on
    if its loss rises by more than after random removal. For each method and target one member is trained, and
    ``num_random`` members without as many random examples, and one with all examples: ``methods * targets +
    num_random + 1`` members in all.

    Args:
        directory: where members are kept, see :class:`RecordedFleet`.
        model: as for :class:`RecordedFleet`, and so are the next four.
        recording: the directory of the recording.
        trainer: any Trainer of one process, or None.
        train: the training data.
        targets: the targets.
        scores: ``(num_targets, num_train)`` for each method by name; positive for examples that raise the output.
        fraction: of the training data that is removed, in (0, 1); at least one example.
        num_random: how many random sets are removed.
        seed: of the random sets.
        output: as for :class:`RecordedFleet`.
        losses: as for :class:`RecordedFleet`.
        overwrite: as for :class:`RecordedFleet`.

    Attributes:
        fleet: trains the members. Its first mask keeps everything; random sets follow, then a mask for each method and
            target, the target changing fastest.
        removed: how many examples are removed.

    Raises:
        ValueError: if scores and data do not fit or are not finite, or a number is out of range; and for all reasons of
            :class:`RecordedFleet`.

    Example::

        scores = {"mine": scores}
        removal = ProponentRemoval(
            "run/top", model, "run/recording", trainer, train, targets, scores
        )
        removal.run(together=25)
        print(removal.effect(of="loss").table().markdown())
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        model: nn.Module,
        recording: str | os.PathLike[str],
        trainer: L.Trainer | None,
        train: Data,
        targets: Data,
        scores: Mapping[str, Tensor],
        *,
        fraction: float = 0.01,
        num_random: int = 20,
        seed: int = 0,
        output: ModelOutput | None = None,
        losses: Callable[[nn.Module, Any], Tensor] | None = None,
        overwrite: bool = False,
    ) -> None:
        trainer = trainer_of(trainer)
        self.num_random = positive("num_random", num_random)
        with isolated_random_states():
            num_train, num_targets = (
                num_examples(single_loader(data, stage, trainer))
                for data, stage in ((train, "fit"), (targets, "predict"))
            )
        require_scores(scores, num_targets, num_train)
        if not scores:
            raise ValueError("expected the scores of some methods, got none")
        random = random_removals(num_train, num_random, fraction, seed)
        self.removed = int((~random[0]).sum())
        self.methods = tuple(scores)
        top = [removal_masks(values.cpu(), self.removed) for values in scores.values()]
        masks = torch.cat([torch.ones(1, num_train, dtype=torch.bool), random, *top])
        self.fleet = RecordedFleet(
            directory,
            model,
            recording,
            trainer,
            train,
            targets,
            masks,
            output=output,
            losses=losses,
            overwrite=overwrite,
        )

    def run(self, *args: Any, **options: Any) -> None:
        """Train the members that are missing; arguments as for :meth:`RecordedFleet.run`."""
        self.fleet.run(*args, **options)

    def effect(self, of: str = "output") -> RemovalEffect:
        """How far outputs or losses moved.

        Args:
            of: ``"output"``, or ``"loss"`` for the loss that the output declares as a function of its value.

        Raises:
            RuntimeError: if members are missing.
            ValueError: if ``of`` is something else.
        """
        require_one_of("of", of, ("output", "loss"))
        found = self.fleet.outputs[..., 0].double()
        if of == "loss":
            found = torch.stack([self.fleet.output.loss(column) for column in found.T], 1)
        num_targets = len(found)
        changes = found[:, 1:] - found[:, :1]
        top = changes[:, self.num_random :].view(num_targets, len(self.methods), num_targets)
        own = torch.arange(num_targets)  # each target by the members without its own proponents
        return RemovalEffect(self.methods, self.removed, top[own, :, own].T, changes[:, : self.num_random].mean(1))
