"""Scalar outputs whose gradients are attributed, and the training loss as a function of each."""

from lightning_trak.outputs.base import ModelOutput
from lightning_trak.outputs.classification.multi_label import MultiLabelMargin
from lightning_trak.outputs.classification.segmentation import SegmentationMargin
from lightning_trak.outputs.classification.single_label import ClassificationMargin
from lightning_trak.outputs.contrastive import ContrastiveMargin
from lightning_trak.outputs.diffusion.loss import DiffusionLoss
from lightning_trak.outputs.diffusion.mean import DiffusionMean
from lightning_trak.outputs.diffusion.square import DiffusionSquare
from lightning_trak.outputs.direction import DirectionOutput
from lightning_trak.outputs.language.causal import CausalLMLogLikelihood, CausalLMMargin, Seq2SeqLMMargin
from lightning_trak.outputs.language.preference import PreferenceMargin
from lightning_trak.outputs.mixin import AttributionMixin
from lightning_trak.outputs.negative_loss import NegativeLoss
from lightning_trak.outputs.policy import AdvantageLogLikelihood
from lightning_trak.outputs.regression import RegressionOutput

__all__ = [
    "AdvantageLogLikelihood",
    "AttributionMixin",
    "CausalLMLogLikelihood",
    "CausalLMMargin",
    "ClassificationMargin",
    "ContrastiveMargin",
    "DiffusionLoss",
    "DiffusionMean",
    "DiffusionSquare",
    "DirectionOutput",
    "ModelOutput",
    "MultiLabelMargin",
    "NegativeLoss",
    "PreferenceMargin",
    "RegressionOutput",
    "SegmentationMargin",
    "Seq2SeqLMMargin",
]
