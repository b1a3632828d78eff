"""Callbacks for a Trainer: they keep snapshots while it trains, and evaluate attributions when it is done."""

from lightning_trak.callbacks.evaluation import AttributionEvaluation
from lightning_trak.callbacks.snapshots import TRAKCallback

__all__ = ["AttributionEvaluation", "TRAKCallback"]
