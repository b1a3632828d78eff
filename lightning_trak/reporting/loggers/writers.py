"""What the loggers that come with Lightning do with histograms, pictures and tables.

The packages behind them are imported by Lightning when a logger is made, and here when it is written to.
"""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any

from fsspec.core import url_to_fs
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from lightning_trak.reporting.loggers.base import LoggerWriter
from lightning_trak.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TensorBoardLoggerWriter(LoggerWriter, logger=TensorBoardLogger):
    """Scalars, histograms and images; tables under "Text"."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """Under "Histograms" and "Distributions"."""
        self.logger.experiment.add_histogram(name, values, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """Under "Images"."""
        self.logger.experiment.add_figure(name, figure, step, close=False)

    def table(self, name: str, table: Table, step: int) -> None:
        """Under "Text", in Markdown."""
        self.logger.experiment.add_text(name, table.markdown(), step)

    def flush(self) -> None:
        """Write the event file."""
        self.logger.experiment.flush()


class CSVLoggerWriter(LoggerWriter, logger=CSVLogger):
    """Numbers in ``metrics.csv``; a file beside it for each picture and table."""

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """A PNG."""
        fs, path = self._place(f"{name}-step-{step}.png")
        with fs.open(path, "wb") as file:
            figure.savefig(file, format="png", dpi=150)

    def table(self, name: str, table: Table, step: int) -> None:
        """A CSV."""
        fs, path = self._place(f"{name}-step-{step}.csv")
        with fs.open(path, "wb") as file:  # as it is: a carriage return in a cell is no end of a line
            file.write(table.csv().encode())

    def _place(self, name: str) -> tuple[Any, str]:
        _ = self.logger.experiment  # which clears the directory when it is made
        fs, root = url_to_fs(self.logger.log_dir)
        path = posixpath.join(root, name)
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        return fs, path


class WandbLoggerWriter(LoggerWriter, logger=WandbLogger):
    """Weights & Biases: its own histograms, images and tables."""

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        """A ``wandb.Histogram``."""
        import wandb

        self.logger.log_metrics({name: wandb.Histogram(values.tolist())}, step)

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """A ``wandb.Image``."""
        self.logger.log_image(name, [figure], step)

    def table(self, name: str, table: Table, step: int) -> None:
        """A ``wandb.Table``."""
        self.logger.log_table(name, list(table.columns), [list(row) for row in table.rows], step=step)


class MLFlowLoggerWriter(LoggerWriter, logger=MLFlowLogger):
    """Numbers as metrics; pictures and tables as artifacts."""

    def figure(self, name: str, figure: Figure, step: int) -> None:
        """A PNG."""
        self.logger.experiment.log_figure(self.logger.run_id, figure, f"{name}-step-{step}.png")

    def table(self, name: str, table: Table, step: int) -> None:
        """A CSV."""
        self.logger.experiment.log_text(self.logger.run_id, table.csv(), f"{name}-step-{step}.csv")
