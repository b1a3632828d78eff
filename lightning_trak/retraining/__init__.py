"""Ground truth: models trained on parts of the data, or one step further."""

from lightning_trak.retraining.fleets.ensembles import FleetSplit, split_fleet
from lightning_trak.retraining.fleets.fleet import RetrainingFleet
from lightning_trak.retraining.fleets.recorded import RecordedFleet
from lightning_trak.retraining.fleets.results import Retrained, read_fleet
from lightning_trak.retraining.fleets.subsets import random_removals, random_subsets
from lightning_trak.retraining.informed import informed_scores
from lightning_trak.retraining.proponents.brittleness import Brittleness
from lightning_trak.retraining.proponents.counterfactuals import Counterfactuals
from lightning_trak.retraining.proponents.masks import joint_removal_mask, removal_masks
from lightning_trak.retraining.proponents.proponent_removal import ProponentRemoval, RemovalEffect
from lightning_trak.retraining.proponents.tail_patch import TailPatch, tail_patch
from lightning_trak.retraining.training.together import StackedModules, train_together
from lightning_trak.retraining.tuning import Measured, Tuning, tune

__all__ = [
    "Brittleness",
    "Counterfactuals",
    "FleetSplit",
    "Measured",
    "ProponentRemoval",
    "RecordedFleet",
    "RemovalEffect",
    "Retrained",
    "RetrainingFleet",
    "StackedModules",
    "TailPatch",
    "Tuning",
    "informed_scores",
    "joint_removal_mask",
    "random_removals",
    "random_subsets",
    "read_fleet",
    "removal_masks",
    "split_fleet",
    "tail_patch",
    "train_together",
    "tune",
]
