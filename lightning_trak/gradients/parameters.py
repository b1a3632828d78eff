"""Which parameters the gradients are taken with respect to, by name."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

# What torch.compile, FSDP and activation checkpointing put into a parameter's name without changing the parameter.
_WRAPPER_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

ParameterSelection = Sequence[str] | str | Callable[[str, nn.Parameter], bool] | None


def canonical_name(name: str) -> str:
    """The parameter's name in the module as the user wrote it, without what wrappers add."""
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def select_parameters(module: nn.Module, selection: ParameterSelection = None) -> dict[str, str]:
    """Choose parameters by name.

    Args:
        module: the module whose parameters are chosen; tied parameters count once, under their first name.
        selection: glob pattern or patterns on the names (``"head.*"``, ``"*lora*"``), a predicate
            ``(name, parameter) -> bool``, or ``None`` for every parameter that requires gradients.

    Returns:
        Canonical name -> name in ``module``, in the module's order.

    Raises:
        ValueError: if nothing is chosen, or a pattern matches nothing.
    """
    parameters = {canonical_name(name): (name, parameter) for name, parameter in module.named_parameters()}
    if selection is None:
        chosen = {name: raw for name, (raw, parameter) in parameters.items() if parameter.requires_grad}
        if not chosen:
            raise ValueError("no parameter of the model requires gradients; name some with parameters=")
        return chosen
    if callable(selection):
        chosen = {name: raw for name, (raw, parameter) in parameters.items() if selection(name, parameter)}
        if not chosen:
            raise ValueError(f"parameters= chose none of the model's parameters: {', '.join(parameters)}")
        return chosen
    patterns = [selection] if isinstance(selection, str) else list(selection)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise ValueError(f"parameters={pattern!r} matches no parameter; the model has: {', '.join(parameters)}")
    return {
        name: raw for name, (raw, _) in parameters.items() if any(fnmatchcase(name, pattern) for pattern in patterns)
    }


def last_layer(module: nn.Module) -> list[str]:
    """Names of the last layer's parameters, to be given as ``parameters=``.

    The last layer is the submodule that was registered last among those with parameters of their own that require
    gradients: the head, in most models. A weight that it shares with another layer counts as a whole.

    Raises:
        ValueError: if no parameter requires gradients.
    """
    names = {id(parameter): canonical_name(name) for name, parameter in module.named_parameters()}
    for layer in reversed(list(module.modules())):
        own = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
        if own:
            return [names[id(parameter)] for parameter in own]
    raise ValueError("no parameter of the model requires gradients, so that there is no last layer")
