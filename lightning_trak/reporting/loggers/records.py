"""Functions that log results: one for each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from torch import Tensor

from lightning_trak.checks import positive
from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.metrics.functional import DetectionCurve
from lightning_trak.reporting.explanations import (
    Describe,
    Example,
    Explanation,
    described,
    explained,
    explanations_table,
    require_data,
    require_positions,
)
from lightning_trak.reporting.loggers.base import LoggerWriter, writer_kinds, writers_for
from lightning_trak.reporting.plots import (
    Picture,
    plot_brittleness,
    plot_mislabel_curves,
    plot_pictures,
    require_drawing,
)
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.scoring.topk import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_trak.retraining import Brittleness

Loggers = Iterable[Logger]


def log_lds(loggers: Loggers, lds: LinearDatamodelingScore, name: str = "lds", step: int = 0) -> None:
    """Log a linear datamodeling score: its mean, interval and noise ceiling, and a histogram over targets.

    All processes must call this together. Rank zero writes.

    Args:
        loggers: such as ``trainer.loggers``.
        lds: the metric, updated with all targets.
        name: numbers are ``{name}/mean``, ``{name}/low``, ``{name}/high`` and, if every subset was retrained with
            several seeds, ``{name}/noise_ceiling``. The histogram is ``{name}/per_target``.
        step: the step at which the loggers show it.

    Raises:
        RuntimeError: if the metric was updated with no targets.
        ValueError: if fewer than two targets count.
    """
    low, high = lds.interval()
    values = {"mean": lds.compute(), "low": low, "high": high}
    with suppress(RuntimeError):  # there is none with a single seed
        values["noise_ceiling"] = lds.noise_ceiling()
    per_target = lds.per_target()
    for writer in writers_for(loggers):
        writer.metrics({f"{name}/{key}": float(value) for key, value in values.items()}, step)
        writer.histogram(f"{name}/per_target", per_target[~per_target.isnan()], step)
        writer.flush()


def log_attributions(
    loggers: Loggers,
    scores: Scores,
    train: Any,
    targets: Any,
    *,
    k: int = 5,
    largest: bool = True,
    shown: Sequence[int] | None = None,
    describe: Describe | None = None,
    image: Callable[[Any], Tensor] | None = None,
    name: str = "attributions",
    step: int = 0,
) -> None:
    """Log the strongest proponents and opponents of some targets: as a table, and as images if there are any.

    Args:
        loggers: such as ``trainer.loggers``.
        scores: ``(num_targets, num_train)``; or the result of ``score(top_k=...)``, of both ends or of one.
        train: the training set, a map-style Dataset. Only the examples shown are read.
        targets: the targets, a map-style Dataset. Only the targets shown are read.
        k: how many proponents and how many opponents each target gets.
        largest: of one end, which: the value that ``score(top_k=...)`` got for it.
        shown: positions of the targets to show. Default: the first 8.
        describe: makes a short text of an item of either dataset, such as its label.
        image: makes an image of an item, ``(height, width)`` or ``(1 or 3, height, width)`` with values in [0, 1].
            Default: no images are logged.
        name: the table is ``{name}/table``, with the columns of a ``.csv`` of :meth:`~lightning_trak.TRAK.show`; the
            picture is ``{name}/images``.
        step: the step at which the loggers show them.

    Raises:
        TypeError: if ``describe`` returns something other than a str, or ``image`` something other than a Tensor.
        ValueError: if the sizes of scores and datasets differ, ``largest`` contradicts the scores, one is not finite,
            or an image has another shape.
        IndexError: if there is no target with one of the positions.
    """
    k = positive("k", k)
    saved = SavedScores(scores, len(train), "", largest)
    saved.require_scores("cannot log these scores")
    require_data(saved, train, targets)
    rows = range(min(8, len(targets))) if shown is None else shown
    require_positions(rows, len(targets))
    writers = writers_for(loggers)
    if not writers:
        return
    read_train, read_target = (cache(partial(_example, data, describe, image)) for data in (train, targets))
    explanations = [explained(row, saved.best(row, k), read_target(row), read_train) for row in rows]
    table = explanations_table(explanations)
    for writer in writers:
        writer.table(f"{name}/table", table, step)
    if image is not None:
        figure = _figure(explanations)
        for writer in writers:
            writer.figure(f"{name}/images", figure, step)
    for writer in writers:
        writer.flush()


def require_logging(loggers: Loggers, images: bool, lds: bool) -> None:
    """Refuse before long work what cannot be logged after it.

    Args:
        loggers: such as ``trainer.loggers``.
        images: whether :func:`log_attributions` will log images.
        lds: whether :func:`log_lds` will be called.

    Raises:
        TypeError: if these are no loggers of Lightning.
        ModuleNotFoundError: if pictures are drawn, and matplotlib is not installed.
    """
    kinds = writer_kinds(loggers)
    if (images and kinds) or (lds and any(kind.histogram is LoggerWriter.histogram for kind in kinds)):
        require_drawing()


def _example(dataset: Any, describe: Describe | None, image: Callable[[Any], Tensor] | None, index: int) -> Example:
    item = dataset[index]
    picture: Any = image(item) if image else None
    if image is not None and not isinstance(picture, Tensor):
        raise TypeError(f"image must return a Tensor, got a {type(picture).__name__}")
    return Example(described(describe, item) if describe else f"#{index}", picture)


def _figure(explanations: Sequence[Explanation]) -> Figure:
    """Targets beside the images of their proponents and opponents."""

    def picture(example: Example, *more: str) -> Picture:
        assert example.image is not None
        return Picture(example.image, "\n".join((example.text, *more)))

    return plot_pictures(
        [picture(each.target) for each in explanations],
        {
            kind: [
                [picture(entry.example, f"{entry.score:+.2g}") for entry in each.groups[kind]] for each in explanations
            ]
            for kind in explanations[0].groups
        },
    )


def log_brittleness(loggers: Loggers, brittleness: Brittleness, name: str = "counterfactuals", step: int = 0) -> None:
    """Log how far outputs fall, and how many predictions flip, without the targets' proponents.

    Args:
        loggers: such as ``trainer.loggers``.
        brittleness: from :meth:`~lightning_trak.retraining.Counterfactuals.brittleness`.
        name: numbers are ``{name}/{method}/drop_{k}`` and so on, see
            :meth:`~lightning_trak.retraining.Brittleness.metrics`. The table is ``{name}/table``, the picture
            ``{name}/curves``.
        step: the step at which the loggers show them.
    """
    for writer in writers_for(loggers):
        writer.metrics({f"{name}/{key}": value for key, value in brittleness.metrics().items()}, step)
        writer.table(f"{name}/table", brittleness.table(), step)
        writer.figure(f"{name}/curves", plot_brittleness(brittleness), step)
        writer.flush()


def log_mislabel_curves(
    loggers: Loggers, curves: Mapping[str, DetectionCurve], name: str = "mislabelled", step: int = 0
) -> None:
    """Log how soon wrong labels are found, if examples are inspected in the order of a suspicion.

    Args:
        loggers: such as ``trainer.loggers``.
        curves: by the name of the suspicion, each from
            :func:`~lightning_trak.metrics.functional.mislabel_detection_curve`.
        name: numbers are ``{name}/{suspicion}/area``, the picture is ``{name}/curves``.
        step: the step at which the loggers show them.
    """
    for writer in writers_for(loggers):
        writer.metrics({f"{name}/{key}/area": float(curve.area) for key, curve in curves.items()}, step)
        writer.figure(f"{name}/curves", plot_mislabel_curves(curves), step)
        writer.flush()
