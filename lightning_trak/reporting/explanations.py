"""Explanations: targets with their strongest proponents and opponents, each with a text and an image."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_trak.checks import positive
from lightning_trak.packages import is_a
from lightning_trak.reporting.items import describe_item, find_image
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.scoring.topk import TopK
from lightning_trak.texts.printable import counted
from lightning_trak.texts.tables import Cell, Table

Describe = Callable[[Any], str]


class Example(NamedTuple):
    """An item of a dataset.

    Attributes:
        text: describes it.
        image: in [0, 1], ``(height, width)`` or ``(3, height, width)``. None if the item holds no image.
    """

    text: str
    image: Tensor | None


class Entry(NamedTuple):
    """A training example and its score for a target.

    Attributes:
        position: in the training set, from 0.
        score: for the target.
        example: the training example itself.
    """

    position: int
    score: float
    example: Example


class Explanation(NamedTuple):
    """A target with its strongest proponents and opponents.

    Attributes:
        position: of the target in its dataset, from 0.
        target: the target itself.
        groups: entries of ``"proponents"`` and ``"opponents"``, strongest first. One of the two is missing if the
            scores are those of the other alone.
        prediction: what the model predicts for the target, in words; None if that is not known.
    """

    position: int
    target: Example
    groups: dict[str, list[Entry]]
    prediction: str | None = None


def heading(group: str, entries: Sequence[Entry]) -> str:
    """The name of a group of entries, and whether none of its scores has the sign that readers expect.

    Args:
        group: ``"proponents"`` or ``"opponents"``.
        entries: of the group.
    """
    sign, name = (1, "positive") if group == "proponents" else (-1, "negative")
    return group if any(entry.score * sign > 0 for entry in entries) else f"{group} (no score is {name})"


def explanations_table(explanations: Sequence[Explanation]) -> Table:
    """Explanations as a table with a row for each proponent and opponent, such as for a spreadsheet.

    Args:
        explanations: what to show.
    """
    columns = ("target", "target_text", "prediction", "group", "rank", "position", "score", "text")
    rows: list[tuple[Cell, ...]] = [
        (
            int(each.position),
            each.target.text,
            each.prediction or "",
            name,
            rank,
            entry.position,
            entry.score,
            entry.example.text,
        )
        for each in explanations
        for name, entries in each.groups.items()
        for rank, entry in enumerate(entries, 1)
    ]
    return Table(columns, rows)


def describe_of(*holders: object) -> Describe | None:
    """The ``describe`` of the first data module or LightningModule among some objects that has one."""
    modules = (holder for holder in holders if is_a(holder, L.LightningDataModule, L.LightningModule))
    return next(filter(None, (getattr(module, "describe", None) for module in modules)), None)


def described(describe: Describe, item: Any) -> str:
    """The text that a user's function makes of an item.

    Args:
        describe: the function.
        item: of a dataset, before collation.

    Raises:
        TypeError: if the function returns something other than a str.
    """
    text: object = describe(item)
    if not isinstance(text, str):
        raise TypeError(f"describe must return a str, got a {type(text).__name__}")
    return text


def require_positions(indices: Sequence[int], num_targets: int) -> None:
    """Check the positions of targets to show.

    Raises:
        TypeError: if they are a number, or a mask, whose bools would count as 0 and 1.
        ValueError: if there are none.
        IndexError: if there is no target with one of the positions.
    """
    if isinstance(indices, int):
        raise TypeError(f"targets are named by a list of positions, such as [{indices}], got {indices}")
    if not len(indices):
        raise ValueError("expected the position of at least one target, got none")
    for index in indices:
        if not hasattr(index, "__index__"):
            raise TypeError(f"targets are named by their positions, which are integers, got {index!r:.80}")
        if torch.as_tensor(index).dtype == torch.bool:
            raise TypeError("targets are named by their positions, not by a mask: use mask.nonzero().flatten()")
        if not 0 <= index < num_targets:
            raise IndexError(f"there is no target {index}: they are numbered from 0 to {num_targets - 1}")


def require_data(saved: SavedScores, train: Any, targets: Any) -> None:
    """Check that scores are of as many training examples and targets as there are.

    Raises:
        ValueError: if they are not.
    """
    if (saved.num_targets, saved.num_train) != (len(targets), len(train)):
        raise ValueError(
            f"the scores are of {counted(saved.num_targets, 'target')} and"
            f" {counted(saved.num_train, 'training example')}, the data hold"
            f" {len(targets)} and {len(train)}; score again, or give the data that were scored"
        )


def explain(
    saved: SavedScores, indices: Sequence[int], k: int, train: Any, targets: Any, describe: Describe | None = None
) -> list[Explanation]:
    """Explain some targets: find their strongest proponents and opponents, and read them from the datasets.

    Args:
        saved: scores of all targets.
        indices: positions of the targets to explain.
        k: how many proponents and how many opponents each target gets.
        train: the training set, a map-style Dataset.
        targets: the targets, a map-style Dataset.
        describe: makes a text of an item. Default: :func:`~lightning_trak.reporting.items.describe_item`; beside an
            image, without shapes.

    Returns:
        An explanation for each of ``indices``, in that order.

    Raises:
        ValueError: if the scores and the datasets have different sizes, ``k`` is less than 1, or there are no indices.
        IndexError: if there is no target with one of the positions.
        TypeError: if ``describe`` returns something other than a str, or ``indices`` are a mask.
    """
    require_data(saved, train, targets)
    k = positive("k", k)
    require_positions(indices, len(targets))

    def example(dataset: Any, index: int) -> Example:
        item = dataset[index]
        image = find_image(item)
        return Example(described(describe or partial(describe_item, shapes=image is None), item), image)

    read = partial(example, train)
    return [explained(index, saved.best(index, k), example(targets, index), read) for index in indices]


def explained(position: int, best: Mapping[str, TopK], target: Example, read: Callable[[int], Example]) -> Explanation:
    """The explanation of a target.

    Args:
        position: of the target in its dataset.
        best: its strongest proponents and opponents, each of shape ``(k,)``.
        target: the target itself.
        read: reads the training example at a position.
    """
    groups = {
        name: [
            Entry(index, value, read(index))
            for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        for name, top in best.items()
    }
    return Explanation(position, target, groups)
