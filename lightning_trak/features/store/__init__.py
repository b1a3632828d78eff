"""Features on disk, and what they depend on."""

from lightning_trak.features.store.feature_store import FeatureStore

__all__ = ["FeatureStore"]
