"""Trained weights: the snapshots of a run, other kinds of checkpoints, and copies of the user's module to load."""

from lightning_trak.checkpoints.base import Checkpoint, CheckpointFormat
from lightning_trak.checkpoints.reading import CheckpointSource, resolve_checkpoints

__all__ = ["Checkpoint", "CheckpointFormat", "CheckpointSource", "resolve_checkpoints"]
