"""Results in the Trainer's loggers: numbers, histograms, pictures and tables."""

from lightning_trak.reporting.loggers.base import LoggerWriter, writers_for
from lightning_trak.reporting.loggers.records import log_attributions, log_brittleness, log_lds, log_mislabel_curves
from lightning_trak.reporting.loggers.writers import (
    CSVLoggerWriter,
    MLFlowLoggerWriter,
    TensorBoardLoggerWriter,
    WandbLoggerWriter,
)

__all__ = [
    "CSVLoggerWriter",
    "LoggerWriter",
    "MLFlowLoggerWriter",
    "TensorBoardLoggerWriter",
    "WandbLoggerWriter",
    "log_attributions",
    "log_brittleness",
    "log_lds",
    "log_mislabel_curves",
    "writers_for",
]
