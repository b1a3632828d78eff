"""Callbacks for a Trainer: one keeps snapshots during training, the other evaluates attributions after it."""

from lightning_trak.callbacks.evaluation import AttributionEvaluation
from lightning_trak.callbacks.snapshots import TRAKCallback

__all__ = ["AttributionEvaluation", "TRAKCallback"]
