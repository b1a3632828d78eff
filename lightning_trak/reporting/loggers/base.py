"""One interface to all loggers. Lightning's own ``Logger`` can log numbers, but no pictures and no tables."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_trak.packages import both
from lightning_trak.reporting.plots import plot_histogram
from lightning_trak.texts.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LoggerWriter(ABC):
    """Writes results to one kind of logger.

    To support another kind of logger, derive a class and name the logger's class as below; nothing else is needed. The
    name of a result is a path such as ``"lds/TRAK/per_target"``.

    Args:
        logger: an instance of the logger's class.

    Attributes:
        kinds: the writer for each class of loggers.

    Example::

        class NeptuneLoggerWriter(LoggerWriter, logger=NeptuneLogger):
            def figure(self, name, figure, step):
                self.logger.experiment[name].append(File.as_image(figure))

            def table(self, name, table, step):
                file = File.from_content(table.csv(), extension="csv")
                self.logger.experiment[name].append(file)
    """

    kinds: ClassVar[dict[type[Any], type[LoggerWriter]]] = {}

    def __init_subclass__(cls, logger: type[Any], **options: Any) -> None:
        super().__init_subclass__(**options)
        LoggerWriter.kinds[logger] = cls

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name."""
        self.logger.log_metrics(dict(values), step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Log the distribution of numbers ``(n,)`` without NaN: as a picture, unless the logger has histograms."""
        self.figure(name, plot_histogram(values, name), step)

    @abstractmethod
    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Log a picture."""

    @abstractmethod
    def table(self, name: str, table: Table, step: int) -> None:
        """Log a table."""

    def flush(self) -> None:
        """Write everything now: the fit, at whose end Lightning does so, may be over."""
        self.logger.save()


class _NumbersWriter(LoggerWriter, logger=Logger):
    """For loggers without a writer of their own: it logs numbers, and warns that it logs nothing else."""

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        rank_zero_warn(
            f"{type(logger).__name__} gets numbers alone, no pictures or tables: derive a class from"
            " lightning_trak.reporting.loggers.LoggerWriter to write them"
        )

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Log nothing, as the warning says."""

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Log nothing, as the warning says."""

    def table(self, name: str, table: Table, step: int) -> None:
        """Log nothing, as the warning says."""


def writers_for(loggers: Iterable[Logger]) -> list[LoggerWriter]:
    """A writer for each logger.

    Args:
        loggers: such as ``trainer.loggers``.

    Returns:
        As many writers as loggers on rank zero, none on other ranks.
    """
    if getattr(rank_zero_only, "rank", 0):
        return []
    return [kind(logger) for kind, logger in zip(writer_kinds(loggers), loggers, strict=True)]


def writer_kinds(loggers: Iterable[Logger]) -> list[type[LoggerWriter]]:
    """The class of the writer for each logger, on every rank.

    Args:
        loggers: such as ``trainer.loggers``.

    Raises:
        TypeError: if these are no loggers of Lightning.
    """
    if not isinstance(loggers, Iterable):
        raise TypeError(f"loggers must be a list of loggers, such as trainer.loggers, got a {type(loggers).__name__}")
    return list(map(_writer_of, loggers))


def _writer_of(logger: Logger) -> type[LoggerWriter]:
    """The writer of the closest class."""
    kinds = {twin: writer for kind, writer in LoggerWriter.kinds.items() for twin in both(kind)}
    found = next((kinds[kind] for kind in type(logger).__mro__ if kind in kinds), None)
    if found is None:
        raise TypeError(f"loggers must be loggers of Lightning, such as trainer.loggers, got a {type(logger).__name__}")
    return found
