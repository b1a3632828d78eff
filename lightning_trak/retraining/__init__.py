"""Ground truth: models trained on parts of the data."""

from lightning_trak.retraining.vectorized import StackedModules, train_together

__all__ = ["StackedModules", "train_together"]
