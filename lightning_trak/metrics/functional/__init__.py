"""Functional metrics; they need torch and NumPy alone."""

from lightning_trak.metrics.functional.bootstrap import crossed_bootstrap_interval
from lightning_trak.metrics.functional.lds import linear_datamodeling_interval, linear_datamodeling_score
from lightning_trak.metrics.functional.noise_ceiling import noise_ceiling
from lightning_trak.metrics.functional.ranking import rank_rows, spearman_corrcoef, spearman_influence

__all__ = [
    "crossed_bootstrap_interval",
    "linear_datamodeling_interval",
    "linear_datamodeling_score",
    "noise_ceiling",
    "rank_rows",
    "spearman_corrcoef",
    "spearman_influence",
]
