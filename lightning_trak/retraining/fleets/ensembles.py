"""Fleets as ensembles: some members are checkpoints of attribution methods, the others measure the scores."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from lightning_trak.checks import positive
from lightning_trak.metrics.functional import used_subsets
from lightning_trak.retraining.fleets.members import Member, MemberStore
from lightning_trak.retraining.fleets.results import Retrained, open_fleet
from lightning_trak.texts.display import tuple_line


class FleetSplit(NamedTuple):
    """A fleet in two parts that share no subset.

    Attributes:
        checkpoints: files with the final weights of members. Each says which training examples its model has seen.
        held_out: the other subsets, and the outputs of the models that were trained on them.
    """

    checkpoints: list[Path]
    held_out: Retrained

    def __repr__(self) -> str:
        return tuple_line(self)


def split_fleet(directory: str | Path, num_subsets: int, num_seeds: int = 1) -> FleetSplit:
    """Split a fleet that has run into checkpoints for attribution and the ground truth to measure it on.

    A model of a random half is as good a checkpoint as one of all data, costs half as much, and is there anyway.
    ``TRAK(model, checkpoints, store)`` takes the curvature at each checkpoint from the examples that its model has
    seen, and scores all training examples at all checkpoints: where the model has not seen an example, its score says
    what the step of adding it does.

    Scores predict the outputs of models that they were made with better than those of new models. So no model of a
    subset that gives a checkpoint is in the ground truth, whatever its seed; nor is one of an equal subset.

    Args:
        directory: the directory of a :class:`~lightning_trak.retraining.RetrainingFleet` that has run with
            ``keep_weights=True``.
        num_subsets: how many subsets give checkpoints: the first ones.
        num_seeds: how many models of each of these subsets. Models of other subsets differ more, so prefer more
            subsets.

    Raises:
        FileNotFoundError: if there is no fleet, or it has not kept the weights.
        RuntimeError: if members are missing.
        ValueError: if the fleet has not as many subsets or seeds, or a file is truncated or altered.

    Example::

        checkpoints, held_out = split_fleet("run/fleet", 20)
        trak = TRAK(model, checkpoints, "run/ensemble-features")
        scores = trak.attribute(trainer, train_loader, targets)
        lds = LinearDatamodelingScore(held_out.masks, used_masks=trak.used_masks)
        lds.update(scores, held_out.outputs)
    """
    store, outputs = open_fleet(directory)
    return split_members(store, num_subsets, num_seeds, outputs)


def split_members(store: MemberStore, num_subsets: int, num_seeds: int, outputs: Tensor) -> FleetSplit:
    """Split a fleet, see :func:`split_fleet`.

    Args:
        store: its members.
        num_subsets: how many subsets give checkpoints.
        num_seeds: how many models of each of these subsets.
        outputs: of all members, ``(num_targets, num_subsets, num_seeds)``.
    """
    num_subsets, num_seeds = positive("num_subsets", num_subsets), positive("num_seeds", num_seeds)
    if num_subsets > outputs.shape[1] or num_seeds > outputs.shape[2]:
        raise ValueError(
            f'fleet "{store.directory}" has {outputs.shape[1]} subsets with {outputs.shape[2]} models each, fewer than'
            f" {num_subsets=} or {num_seeds=}; ask for fewer, or train more"
        )
    checkpoints = [store.weights(Member(subset, seed)) for seed in range(num_seeds) for subset in range(num_subsets)]
    used = set(used_subsets(store.masks, store.masks[:num_subsets]))
    kept = [subset for subset in range(len(store.masks)) if subset not in used]
    return FleetSplit(checkpoints, Retrained(store.masks[kept], outputs[:, kept]))
