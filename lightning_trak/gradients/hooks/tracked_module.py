"""Finds the modules that hooks are attached to, and the parameters that hooks leave out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_trak.gradients.hooks.layers import Layer, layer_of
from lightning_trak.texts.messages import listed


@dataclass(frozen=True, eq=False)
class TrackedModule:
    """A module with selected parameters that hooks differentiate.

    Args:
        path: the module's name in the model.
        layer: the layer class's object for this module.
        parameters: attribute of the module -> canonical parameter name, for selected parameters only.
    """

    path: str
    layer: Layer
    parameters: dict[str, str]

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self.layer.module

    @property
    def description(self) -> str:
        """Its path and type, for errors."""
        return f"{self.path or 'the model itself'} ({type(self.module).__name__})"


def find_tracked_modules(module: nn.Module, names: dict[str, str]) -> tuple[list[TrackedModule], dict[str, str]]:
    """Find a layer class for every module that has selected parameters.

    Args:
        module: the model.
        names: canonical parameter name -> name in ``module``.

    Returns:
        The modules to attach hooks to. Then the parameters that hooks leave out: canonical name -> reason. If several
        modules share a parameter and hooks cannot differentiate one of these modules, the parameter is left out.
    """
    parameters = dict(module.named_parameters())
    canonical = {parameters[raw]: name for name, raw in names.items()}
    candidates: list[TrackedModule] = []
    left_out: dict[str, str] = {}
    for path, part in module.named_modules():
        own = {
            attribute: canonical[parameter]
            for attribute, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
            if parameter in canonical
        }
        if not own:
            continue
        layer = layer_of(part)
        for attribute, name in own.items():
            reason = _refusal(part, layer, attribute)
            if reason is not None:
                left_out[name] = f"{type(part).__name__}: {reason}"
        if layer is not None:
            candidates.append(TrackedModule(path, layer, own))
    tracked = []
    for candidate in candidates:
        kept = {attribute: name for attribute, name in candidate.parameters.items() if name not in left_out}
        if kept:
            tracked.append(TrackedModule(candidate.path, candidate.layer, kept))
    return tracked, left_out


def _refusal(module: nn.Module, layer: Layer | None, attribute: str) -> str | None:
    if layer is None:
        return "no layer class covers this type"
    if "forward" in vars(module):
        return "its forward was replaced"
    if getattr(module, attribute).is_complex():
        return "its weights are complex"
    if attribute not in layer.parameter_names:
        return f"{type(layer).__name__} does not know the parameter {attribute!r}"
    return layer.refusal()


def coverage_report(left_out: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """A text: which parameters hooks leave out, their share of all elements, and what to do to use hooks.

    Args:
        left_out: canonical parameter name -> reason.
        sizes: canonical name of every selected parameter -> number of its elements.
    """
    total = sum(sizes.values())
    if not left_out:
        return f"hooks cover all {len(sizes)} parameters ({total} elements)"
    missing = sum(sizes[name] for name in left_out)
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(f"{name} [{100 * sizes[name] / total:.3g}%]")
    reasons = "; ".join(f"{reason}: {listed(names)}" for reason, names in by_reason.items())
    return (
        f"hooks cover {len(sizes) - len(left_out)} of {len(sizes)} parameters and leave out"
        f" {100 * missing / total:.3g}% of their {total} elements: {reasons}. To use hooks, leave them out by"
        " parameters=, or cover their modules' types by a subclass of Layer"
    )
