"""Trained weights: the snapshots of a run, any other checkpoint, and copies of the user's module that get them."""

from lightning_trak.checkpoints.base import Checkpoint, CheckpointFormat
from lightning_trak.checkpoints.reading import CheckpointSource, resolve_checkpoints

__all__ = ["Checkpoint", "CheckpointFormat", "CheckpointSource", "resolve_checkpoints"]
