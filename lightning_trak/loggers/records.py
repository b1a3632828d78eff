"""What is logged of each kind of result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_trak.loggers.base import writers_for
from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.metrics.functional import DetectionCurve
from lightning_trak.plots import plot_attributions, plot_brittleness, plot_mislabel_curves
from lightning_trak.retraining.brittleness import Brittleness
from lightning_trak.scorers.topk import block_top_k
from lightning_trak.tables import Cell, Table

Loggers = Iterable[Logger]


def log_lds(loggers: Loggers, lds: LinearDatamodelingScore, name: str = "lds", step: int = 0) -> None:
    """Log a linear datamodeling score: its mean with the interval and noise ceiling, and how targets are distributed.

    Args:
        loggers: such as ``trainer.loggers``.
        lds: which has seen its targets. All processes must call this together; rank zero writes.
        name: numbers are ``{name}/mean``, ``{name}/low``, ``{name}/high`` and, if every subset was retrained with
            several seeds, ``{name}/noise_ceiling``; the histogram is ``{name}/per_target``.
        step: that the loggers show.

    Raises:
        RuntimeError: if it has seen no targets.
        ValueError: if fewer than two targets count.
    """
    low, high = lds.interval()
    values = {"mean": lds.compute(), "low": low, "high": high}
    with suppress(RuntimeError):  # with a single seed there is none
        values["noise_ceiling"] = lds.noise_ceiling()
    per_target = lds.per_target()
    for writer in writers_for(loggers):
        writer.metrics({f"{name}/{key}": float(value) for key, value in values.items()}, step)
        writer.histogram(f"{name}/per_target", per_target[~per_target.isnan()], step)
        writer.flush()


def log_attributions(
    loggers: Loggers,
    scores: Tensor,
    train: Any,
    targets: Any,
    *,
    k: int = 5,
    shown: Sequence[int] | None = None,
    describe: Callable[[Any], str] | None = None,
    image: Callable[[Any], Tensor] | None = None,
    name: str = "attributions",
    step: int = 0,
) -> None:
    """Log the strongest proponents and opponents of some targets, as a table, and as a picture of images.

    Args:
        loggers: such as ``trainer.loggers``.
        scores: ``(num_targets, num_train)``.
        train: the training set, a map-style Dataset, of which only the examples shown are read.
        targets: the targets, alike.
        k: proponents and opponents of each target.
        shown: positions of the targets to show; default: the first 8.
        describe: says in a few words what an item of either dataset is: its label, say, or its text.
        image: makes a picture of an item, ``(height, width)`` or ``(1 or 3, height, width)`` with colours in [0, 1].
        name: the table is ``{name}/table``, the picture ``{name}/images``.
        step: that the loggers show.

    Raises:
        ValueError: if scores and data do not fit.
    """
    if scores.shape != (len(targets), len(train)):
        raise ValueError(f"expected scores of shape {(len(targets), len(train))}, got {tuple(scores.shape)}")
    writers = writers_for(loggers)
    if not writers:
        return
    rows = list(range(min(8, len(targets))) if shown is None else shown)
    scores, k = scores[rows].cpu(), min(k, len(train))
    extremes = {"proponent": block_top_k(scores, 0, k, True), "opponent": block_top_k(scores, 0, k, False)}
    seen = torch.unique(torch.cat([top.indices.flatten() for top in extremes.values()])).tolist()
    examples, aims = ({place: data[place] for place in places} for data, places in ((train, seen), (targets, rows)))
    names, aim_names = (
        {place: describe(item) if describe else f"#{place}" for place, item in items.items()}
        for items in (examples, aims)
    )
    found: list[tuple[Cell, ...]] = [
        (row, aim_names[row], kind, rank + 1, index, names[index], float(value))
        for number, row in enumerate(rows)
        for kind, top in extremes.items()
        for rank, (index, value) in enumerate(zip(top.indices[number].tolist(), top.values[number], strict=True))
    ]
    table = Table(("target", "target is", "kind", "rank", "example", "example is", "score"), found)
    for writer in writers:
        writer.table(f"{name}/table", table, step)
    if image is not None:
        figure = plot_attributions(
            torch.stack([image(aims[row]) for row in rows]),
            torch.stack([image(examples[place]) for place in seen]),
            scores[:, seen],
            k,
            [aim_names[row] for row in rows],
            [names[place] for place in seen],
        )
        for writer in writers:
            writer.figure(f"{name}/images", figure, step)
    for writer in writers:
        writer.flush()


def log_brittleness(loggers: Loggers, brittleness: Brittleness, name: str = "counterfactuals", step: int = 0) -> None:
    """Log how far predictions fall without their proponents.

    Args:
        loggers: such as ``trainer.loggers``.
        brittleness: from :meth:`~lightning_trak.retraining.Counterfactuals.brittleness`.
        name: numbers are ``{name}/{method}/drop_{k}`` and so on, see
            :meth:`~lightning_trak.retraining.Brittleness.metrics`; the table is ``{name}/table``, the picture
            ``{name}/curves``.
        step: that the loggers show.
    """
    for writer in writers_for(loggers):
        writer.metrics({f"{name}/{key}": value for key, value in brittleness.metrics().items()}, step)
        writer.table(f"{name}/table", brittleness.table(), step)
        writer.figure(f"{name}/curves", plot_brittleness(brittleness), step)
        writer.flush()


def log_mislabel_curves(
    loggers: Loggers, curves: Mapping[str, DetectionCurve], name: str = "mislabelled", step: int = 0
) -> None:
    """Log how soon suspicions find wrong labels.

    Args:
        loggers: such as ``trainer.loggers``.
        curves: of each suspicion by name, from
            :func:`~lightning_trak.metrics.functional.mislabel_detection_curve`.
        name: numbers are ``{name}/{suspicion}/area``, the picture ``{name}/curves``.
        step: that the loggers show.
    """
    for writer in writers_for(loggers):
        writer.metrics({f"{name}/{key}/area": float(curve.area) for key, curve in curves.items()}, step)
        writer.figure(f"{name}/curves", plot_mislabel_curves(curves), step)
        writer.flush()
