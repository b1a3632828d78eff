"""Targets beside their proponents and opponents, each with a description that people can read."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_trak.reporting.items import describe_item, find_image
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.texts import counted

Describe = Callable[[Any], str]


class Example(NamedTuple):
    """An item of a dataset.

    Attributes:
        text: what it is.
        image: in [0, 1], ``(height, width)`` or ``(3, height, width)``, if it holds one.
    """

    text: str
    image: Tensor | None


class Entry(NamedTuple):
    """A training example and its score for a target.

    Attributes:
        position: in the training set.
        score: of the method.
        example: the item.
    """

    position: int
    score: float
    example: Example


class Explanation(NamedTuple):
    """A target and the training examples that count most for it.

    Attributes:
        position: in its dataset.
        target: the item.
        groups: ``"proponents"`` and ``"opponents"``, strongest first; one of them where only that was kept.
    """

    position: int
    target: Example
    groups: dict[str, list[Entry]]


def described(describe: Describe, item: Any) -> str:
    """The text that a user's function makes of an item.

    Raises:
        TypeError: if it is none.
    """
    text: object = describe(item)
    if not isinstance(text, str):
        raise TypeError(f"describe must return a str, got a {type(text).__name__}")
    return text


def explain(
    saved: SavedScores, indices: Sequence[int], k: int, train: Any, targets: Any, describe: Describe | None = None
) -> list[Explanation]:
    """Look the strongest proponents and opponents of some targets up in the datasets.

    Args:
        saved: scores of all targets.
        indices: positions of the wanted targets.
        k: proponents and opponents of each.
        train: the training set, map-style.
        targets: the targets, map-style.
        describe: makes a text of an item; default:
            :func:`~lightning_trak.reporting.items.describe_item`.

    Raises:
        ValueError: if scores and datasets are of different sizes.
        IndexError: if there is no such target.
        TypeError: if ``describe`` returns something else than a text.
    """
    if (saved.num_targets, saved.num_train) != (len(targets), len(train)):
        raise ValueError(
            f"the scores are of {counted(saved.num_targets, 'target')} and"
            f" {counted(saved.num_train, 'training example')}, the data hold"
            f" {len(targets)} and {len(train)}; score again, or show the data that were scored"
        )
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for index in indices:
        if not 0 <= index < len(targets):
            raise IndexError(f"there is no target {index}: they are numbered from 0 to {len(targets) - 1}")

    def example(dataset: Any, index: int) -> Example:
        item = dataset[index]
        return Example(described(describe or describe_item, item), find_image(item))

    return [
        Explanation(
            index,
            example(targets, index),
            {
                name: [
                    Entry(position, value, example(train, position))
                    for position, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ]
                for name, best in saved.best(index, k).items()
            },
        )
        for index in indices
    ]
