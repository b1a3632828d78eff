"""Recorded training runs: their files, doing their steps again, and differentiating through them."""

from lightning_trak.replay.optimizers import OptimizerStep
from lightning_trak.replay.optimizers.smooth import SmoothAdamW
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.replaying import Replayed, replay
from lightning_trak.replay.smoothness import Smoothness, metasmoothness

__all__ = ["OptimizerStep", "Recording", "Replayed", "SmoothAdamW", "Smoothness", "metasmoothness", "replay"]
