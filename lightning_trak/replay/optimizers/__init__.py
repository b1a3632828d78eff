"""Optimizer steps as functions, which can be differentiated: one class for each optimizer of torch."""

from lightning_trak.replay.optimizers import adam, muon, sgd, smooth
from lightning_trak.replay.optimizers.base import OptimizerStep, optimizer_step

__all__ = ["OptimizerStep", "adam", "muon", "optimizer_step", "sgd", "smooth"]
