"""Names of tensors without what wrappers add."""

from torch import Tensor, nn

from lightning_trak.compatibility import WRAPPERS


def canonical_name(name: str) -> str:
    """The parameter's name in the module as the user wrote it, without the parts that wrappers add."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module not in WRAPPERS), last])


def named_tensors(module: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Canonical name -> (name, tensor) for all parameters and buffers; tied ones appear under each of their names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {canonical_name(raw): (raw, tensor) for raw, tensor in named}
