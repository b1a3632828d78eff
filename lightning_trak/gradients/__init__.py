"""Per-example gradients of the declared output."""

from lightning_trak.gradients.base import GradientEngine
from lightning_trak.gradients.functional import FunctionalEngine
from lightning_trak.gradients.hooks import (
    HookEngine,
    Layer,
    LayerCall,
    MixedEngine,
    ShardedHookEngine,
    coverage_report,
)
from lightning_trak.gradients.loop import LoopEngine
from lightning_trak.gradients.parameters import ParameterSelection, last_layer, select_parameters

__all__ = [
    "FunctionalEngine",
    "GradientEngine",
    "HookEngine",
    "Layer",
    "LayerCall",
    "LoopEngine",
    "MixedEngine",
    "ParameterSelection",
    "ShardedHookEngine",
    "coverage_report",
    "last_layer",
    "select_parameters",
]
