"""Selects by name the parameters that outputs are differentiated by."""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_trak.checkpoints.names import canonical_name

ParameterSelection = Sequence[str] | str | Callable[[str, nn.Parameter], bool] | None


class _Named(NamedTuple):
    """A parameter, its first name in the module, and its canonical names. A tied parameter has several of them."""

    parameter: nn.Parameter
    raw: str
    names: list[str]


def select_parameters(module: nn.Module, selection: ParameterSelection = None) -> dict[str, str]:
    """Choose parameters by name.

    Args:
        module: the module with the parameters. A tied parameter counts once, under its first name, and any of its names
            selects it. Parameters without elements are left out.
        selection: one or more glob patterns for names (``"head.*"``, ``"*lora*"``), a function
            ``(name, parameter) -> bool``, or ``None`` for every parameter that requires gradients.

    Returns:
        Canonical name -> name in ``module``, in the module's order.

    Raises:
        TypeError: if the selection is of another type.
        ValueError: if nothing is selected, a pattern matches nothing, or a lazy parameter has no shape yet.
    """
    parameters = _named(module)
    known = ", ".join(name for entry in parameters for name in entry.names)
    if selection is None:
        chosen = [entry for entry in parameters if entry.parameter.requires_grad]
        advice = "no parameter of the model requires gradients; name some with parameters="
    elif callable(selection) and not isinstance(selection, nn.Module):
        chosen = [entry for entry in parameters if any(selection(name, entry.parameter) for name in entry.names)]
        advice = f"parameters= chose none of the model's parameters: {known}"
    else:
        patterns = [selection] if isinstance(selection, str) else _patterns(selection)
        for pattern in patterns:
            if not _matching(parameters, [pattern]):
                within = f"{pattern.rstrip('.')}.*"
                hint = f"; did you mean {within!r}?" if _matching(parameters, [within]) else ""
                raise ValueError(f"parameters={pattern!r} matches no parameter; the model has: {known}{hint}")
        chosen = _matching(parameters, patterns)
        advice = f"parameters={selection!r} chose none of the model's parameters: {known}"
    if not chosen:
        raise ValueError(advice)
    found = {entry.names[0]: entry.raw for entry in chosen if entry.parameter.numel()}
    if not found:
        raise ValueError(f"parameters= chose only parameters without elements: {', '.join(e.names[0] for e in chosen)}")
    return found


def _patterns(selection: object) -> list[str]:
    """A sequence of patterns as a list."""
    found = list(selection) if isinstance(selection, Iterable) else [selection]
    patterns = [pattern for pattern in found if isinstance(pattern, str)]
    if len(patterns) < len(found):
        raise TypeError(
            "expected parameters as patterns for names, such as ['head.*'], or as a function (name, parameter) -> bool,"
            f" got {selection!r:.200}"
        )
    return patterns


def _matching(parameters: Sequence[_Named], patterns: Sequence[str]) -> list[_Named]:
    """The parameters with a name that fits one of the patterns."""
    return [
        entry for entry in parameters if any(fnmatchcase(name, pattern) for name in entry.names for pattern in patterns)
    ]


def _named(module: nn.Module) -> list[_Named]:
    found: dict[int, _Named] = {}
    for raw, parameter in module.named_parameters(remove_duplicate=False):
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"parameter {canonical_name(raw)!r} has no shape yet, since its layer is lazy; call the"
                f" {type(module).__name__} on a batch once before attribution"
            )
        found.setdefault(id(parameter), _Named(parameter, raw, [])).names.append(canonical_name(raw))
    return list(found.values())


def last_layer(module: nn.Module) -> list[str]:
    """Names of the last layer's parameters, for ``parameters=``.

    The last layer is the last registered submodule that has its own parameters with gradients. In most models, this is
    the head. If it shares a weight with another layer, the gradient has the parts of both layers.

    Raises:
        ValueError: if no parameter requires gradients.
    """
    names = {id(parameter): canonical_name(name) for name, parameter in module.named_parameters()}
    for layer in reversed(list(module.modules())):
        own = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
        if own:
            return [names[id(parameter)] for parameter in own]
    raise ValueError("no parameter of the model requires gradients, so there is no last layer")
