"""Callbacks for a Trainer: they keep snapshots of training, record it, and evaluate attributions after it."""

from lightning_trak.callbacks.evaluation import AttributionEvaluation
from lightning_trak.callbacks.recorder import TrainingRecorder
from lightning_trak.callbacks.snapshots import TRAKCallback

__all__ = ["AttributionEvaluation", "TRAKCallback", "TrainingRecorder"]
