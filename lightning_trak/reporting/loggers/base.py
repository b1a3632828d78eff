"""One interface to all loggers: Lightning's own has a method for numbers alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from lightning.pytorch.loggers import Logger
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from lightning_trak.reporting.plots import plot_histogram
from lightning_trak.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class LoggerWriter(ABC):
    """Writes to a logger. A class for another kind of logger derives from this one and names it.

    Names are paths such as ``"lds/TRAK/per_target"``.

    Args:
        logger: of the kind that the class is for.

    Example::

        class NeptuneLoggerWriter(LoggerWriter, logger=NeptuneLogger):
            def figure(self, name, figure, step):
                self.logger.experiment[name].append(File.as_image(figure))

            def table(self, name, table, step):
                self.logger.experiment[name].append(File.from_content(table.csv(), extension="csv"))
    """

    kinds: ClassVar[dict[type[Any], type[LoggerWriter]]] = {}

    def __init_subclass__(cls, logger: type[Any], **options: Any) -> None:
        super().__init_subclass__(**options)
        LoggerWriter.kinds[logger] = cls

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by name."""
        self.logger.log_metrics(dict(values), step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """How numbers ``(n,)``, none of them NaN, are distributed: a picture, unless the logger knows histograms."""
        self.figure(name, plot_histogram(values, name), step)

    @abstractmethod
    def figure(self, name: str, figure: Figure, step: int) -> None:
        """A picture."""

    @abstractmethod
    def table(self, name: str, table: Table, step: int) -> None:
        """A table."""

    def flush(self) -> None:
        """Have everything written, since the fit that would do so in the end may be over."""
        self.logger.save()


class _NumbersWriter(LoggerWriter, logger=Logger):
    """For any logger that no other class is for."""

    def __init__(self, logger: Logger) -> None:
        super().__init__(logger)
        rank_zero_warn(
            f"{type(logger).__name__} gets numbers alone, no pictures or tables: derive a class from"
            " lightning_trak.reporting.loggers.LoggerWriter to write them"
        )

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Left out, as announced."""

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Left out, as announced."""

    def table(self, name: str, table: Table, step: int) -> None:
        """Left out, as announced."""


def writers_for(loggers: Iterable[Logger]) -> list[LoggerWriter]:
    """A writer for each logger; none on ranks other than zero.

    Args:
        loggers: such as ``trainer.loggers``.
    """
    if getattr(rank_zero_only, "rank", 0):
        return []
    kinds = LoggerWriter.kinds
    return [next(kinds[kind] for kind in type(logger).__mro__ if kind in kinds)(logger) for logger in loggers]
