"""Trained weights: the snapshots of a run, any other checkpoint, and copies of the user's module that get them."""

from lightning_trak.checkpoints.reading import Checkpoint, CheckpointSource, resolve_checkpoints

__all__ = ["Checkpoint", "CheckpointSource", "resolve_checkpoints"]
