"""Metrics that say how good attributions are, in the manner of torchmetrics."""

from lightning_trak.metrics.lds import LinearDatamodelingScore

__all__ = ["LinearDatamodelingScore"]
