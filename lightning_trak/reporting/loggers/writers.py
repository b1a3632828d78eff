"""Writers for the loggers that come with Lightning.

Their packages, such as wandb, are imported where they are used: Lightning imports them when a logger is made.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_trak.reporting.loggers.base import LoggerWriter
from lightning_trak.texts.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TensorBoardLoggerWriter(LoggerWriter, logger=TensorBoardLogger):
    """TensorBoard: scalars, histograms and images. Tables are texts."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Log a histogram, under "Histograms" and "Distributions"."""
        self.logger.experiment.add_histogram(name, values, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Log an image, under "Images"."""
        self.logger.experiment.add_figure(name, figure, step, close=False)

    def table(self, name: str, table: Table, step: int) -> None:
        """Log the table in Markdown, under "Text"."""
        self.logger.experiment.add_text(name, table.markdown(), step)

    def flush(self) -> None:
        """Write the event file."""
        self.logger.experiment.flush()


class CSVLoggerWriter(LoggerWriter, logger=CSVLogger):
    """Numbers go to ``metrics.csv``. Each picture and each table is a file beside it."""

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Write a PNG file."""
        fs, path = self._place(f"{name}-step-{step}.png")
        with fs.open(path, "wb") as file:
            figure.savefig(file, format="png", dpi=150)

    def table(self, name: str, table: Table, step: int) -> None:
        """Write a CSV file."""
        fs, path = self._place(f"{name}-step-{step}.csv")
        with fs.open(path, "wb") as file:  # as bytes, so that a carriage return in a cell is not changed
            file.write(table.csv().encode())

    def _place(self, name: str) -> tuple[Any, str]:
        _ = self.logger.experiment  # when it is made, it clears the directory
        fs, root = url_to_fs(self.logger.log_dir)
        path = posixpath.join(root, name)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        return fs, path


class WandbLoggerWriter(LoggerWriter, logger=WandbLogger):
    """Weights & Biases: all as its own kinds."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Log a ``wandb.Histogram``."""
        import wandb

        self.logger.log_metrics({name: wandb.Histogram(values.tolist())}, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Log a ``wandb.Image``."""
        self.logger.log_image(name, [figure], step)

    def table(self, name: str, table: Table, step: int) -> None:
        """Log a ``wandb.Table``."""
        self.logger.log_table(name, list(table.columns), [list(row) for row in table.rows], step=step)


class MLFlowLoggerWriter(LoggerWriter, logger=MLFlowLogger):
    """MLflow: numbers are metrics, pictures and tables are artifacts."""

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Write a PNG file."""
        self.logger.experiment.log_figure(self.logger.run_id, figure, f"{name}-step-{step}.png")

    def table(self, name: str, table: Table, step: int) -> None:
        """Write a CSV file."""
        self.logger.experiment.log_text(self.logger.run_id, table.csv(), f"{name}-step-{step}.csv")
