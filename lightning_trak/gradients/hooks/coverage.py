"""Which parameters hooks can differentiate, and what to tell about the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_trak.gradients.hooks.layers import Layer, layer_of


@dataclass(frozen=True, eq=False)
class Site:
    """A module that owns selected parameters.

    Args:
        path: the module's name in the model.
        module: the module.
        layer: how to differentiate it.
        parameters: attribute of the module -> canonical parameter name, selected parameters only.
    """

    path: str
    module: nn.Module
    layer: type[Layer]
    parameters: dict[str, str]


def find_sites(module: nn.Module, names: dict[str, str]) -> tuple[list[Site], dict[str, str]]:
    """Look up a layer class for every module that owns selected parameters.

    Args:
        module: the model.
        names: canonical parameter name -> name in ``module``.

    Returns:
        The sites of the parameters that hooks see wherever they are tied to, and, by canonical name, the reason why
        each other parameter is left out.
    """
    parameters = dict(module.named_parameters())
    canonical = {parameters[raw]: name for name, raw in names.items()}
    sites: list[Site] = []
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
                left_out[name] = f"{path or 'the model itself'} ({type(part).__name__}): {reason}"
        if layer is not None:
            sites.append(Site(path, part, layer, own))
    kept = (
        Site(site.path, site.module, site.layer, {a: n for a, n in site.parameters.items() if n not in left_out})
        for site in sites
    )
    return [site for site in kept if site.parameters], left_out


def _refusal(module: nn.Module, layer: type[Layer] | None, attribute: str) -> str | None:
    if layer is None:
        return "no layer class covers this type"
    if "forward" in vars(module):
        return "its forward was replaced"
    if getattr(module, attribute).is_complex():
        return "its weights are complex"
    if not hasattr(layer, attribute):
        return f"{layer.__name__} does not know the parameter {attribute!r}"
    return layer.refusal(module)


def coverage_report(left_out: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """Say which parameters hooks leave out, what share of the gradient they are, and what to do.

    Args:
        left_out: canonical parameter name -> reason.
        sizes: number of elements of every selected parameter.
    """
    total = sum(sizes.values())
    if not left_out:
        return f"hooks cover all {len(sizes)} parameters ({total} elements)"
    missing = sum(sizes[name] for name in left_out)
    reasons = "; ".join(f"{name} [{100 * sizes[name] / total:.3g}%]: {reason}" for name, reason in left_out.items())
    return (
        f"hooks cover {len(sizes) - len(left_out)} of {len(sizes)} parameters and leave out"
        f" {100 * missing / total:.3g}% of their {total} elements: {reasons}. Differentiate these by vmap"
        " (MixedEngine), leave them out by parameters=, or cover their modules' types by a subclass of Layer"
    )
