"""Per-example gradients by module hooks: one small class per family of layers, and the engine that drives them."""

from lightning_trak.gradients.hooks import activation, convolution, embedding, linear, normalization
from lightning_trak.gradients.hooks.coverage import coverage_report
from lightning_trak.gradients.hooks.engine import HookEngine
from lightning_trak.gradients.hooks.layers import Layer
from lightning_trak.gradients.hooks.mixed import MixedEngine
from lightning_trak.gradients.hooks.sharded import ShardedHookEngine

# The modules fill the registry when they are imported.
FAMILIES = (activation, convolution, embedding, linear, normalization)

__all__ = ["HookEngine", "Layer", "MixedEngine", "ShardedHookEngine", "coverage_report"]
