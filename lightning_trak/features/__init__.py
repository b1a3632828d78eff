"""From a training set to features on disk: projected gradients of each example at each checkpoint."""

from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore

__all__ = ["FeatureStore", "Features"]
