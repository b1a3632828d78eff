"""Functional metrics; they need torch and NumPy alone."""

from lightning_trak.metrics.functional.bootstrap import bootstrap_interval, crossed_bootstrap_interval
from lightning_trak.metrics.functional.equal_subsets import used_subsets
from lightning_trak.metrics.functional.lds import linear_datamodeling_interval, linear_datamodeling_score
from lightning_trak.metrics.functional.mislabelled import DetectionCurve, flip_labels, mislabel_detection_curve
from lightning_trak.metrics.functional.noise_ceiling import noise_ceiling
from lightning_trak.metrics.functional.ranking import rank_rows, spearman_corrcoef, spearman_influence

__all__ = [
    "DetectionCurve",
    "bootstrap_interval",
    "crossed_bootstrap_interval",
    "flip_labels",
    "linear_datamodeling_interval",
    "linear_datamodeling_score",
    "mislabel_detection_curve",
    "noise_ceiling",
    "rank_rows",
    "spearman_corrcoef",
    "spearman_influence",
    "used_subsets",
]
