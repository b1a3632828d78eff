"""Per-example gradients by module hooks: a small class for each family of layers, and the engine that uses them."""

from lightning_trak.gradients.hooks.engine import HookEngine
from lightning_trak.gradients.hooks.fsdp import ShardedHookEngine
from lightning_trak.gradients.hooks.layers import Layer, LayerCall
from lightning_trak.gradients.hooks.mixed import MixedEngine
from lightning_trak.gradients.hooks.tracked_module import coverage_report

__all__ = ["HookEngine", "Layer", "LayerCall", "MixedEngine", "ShardedHookEngine", "coverage_report"]
