"""Types of layers that hooks can differentiate, with a file for each family. The imports here fill the registry."""

from lightning_trak.gradients.hooks.layers.activation import PReLULayer
from lightning_trak.gradients.hooks.layers.base import Layer, LayerCall, layer_of
from lightning_trak.gradients.hooks.layers.convolution import ConvolutionLayer
from lightning_trak.gradients.hooks.layers.embedding import EmbeddingLayer, LookupEmbeddingLayer, ScaledEmbeddingLayer
from lightning_trak.gradients.hooks.layers.linear import LinearLayer, TransposedLinearLayer
from lightning_trak.gradients.hooks.layers.normalization import (
    BatchNormLayer,
    GroupNormLayer,
    LayerNormLayer,
    RMSNormLayer,
)
from lightning_trak.gradients.hooks.layers.scale import ScaleLayer

__all__ = [
    "BatchNormLayer",
    "ConvolutionLayer",
    "EmbeddingLayer",
    "GroupNormLayer",
    "Layer",
    "LayerCall",
    "LayerNormLayer",
    "LinearLayer",
    "LookupEmbeddingLayer",
    "PReLULayer",
    "RMSNormLayer",
    "ScaleLayer",
    "ScaledEmbeddingLayer",
    "TransposedLinearLayer",
    "layer_of",
]
