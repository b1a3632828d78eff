"""Ground truth: models trained on parts of the data."""

from lightning_trak.retraining.brittleness import Brittleness
from lightning_trak.retraining.counterfactuals import Counterfactuals, removal_masks
from lightning_trak.retraining.fleet import RetrainingFleet
from lightning_trak.retraining.members import Retrained, read_fleet
from lightning_trak.retraining.subsets import random_subsets
from lightning_trak.retraining.vectorized import StackedModules, train_together

__all__ = [
    "Brittleness",
    "Counterfactuals",
    "Retrained",
    "RetrainingFleet",
    "StackedModules",
    "random_subsets",
    "read_fleet",
    "removal_masks",
    "train_together",
]
