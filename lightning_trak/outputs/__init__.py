"""Scalar outputs whose gradients are attributed, and the training loss as a function of each."""

from lightning_trak.outputs.base import ModelOutput
from lightning_trak.outputs.classification import ClassificationMargin
from lightning_trak.outputs.contrastive import ContrastiveMargin
from lightning_trak.outputs.language import CausalLMMargin, Seq2SeqLMMargin
from lightning_trak.outputs.mixin import AttributionMixin
from lightning_trak.outputs.negative_loss import NegativeLoss
from lightning_trak.outputs.regression import RegressionOutput

__all__ = [
    "AttributionMixin",
    "CausalLMMargin",
    "ClassificationMargin",
    "ContrastiveMargin",
    "ModelOutput",
    "NegativeLoss",
    "RegressionOutput",
    "Seq2SeqLMMargin",
]
