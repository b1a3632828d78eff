"""Callbacks for a Trainer: they keep snapshots of training, record it, make it smoother, and evaluate attributions."""

from lightning_trak.callbacks.evaluation import AttributionEvaluation
from lightning_trak.callbacks.fabric import FabricSnapshots
from lightning_trak.callbacks.recorder import TrainingRecorder
from lightning_trak.callbacks.snapshots import TRAKCallback
from lightning_trak.callbacks.twin import SmoothTwin

__all__ = ["AttributionEvaluation", "FabricSnapshots", "SmoothTwin", "TRAKCallback", "TrainingRecorder"]
