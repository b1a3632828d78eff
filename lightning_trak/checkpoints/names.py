"""Names of parameters without what wrappers add."""

from collections.abc import Mapping

from torch import Tensor

from lightning_trak.compatibility import WRAPPERS
from lightning_trak.storage.files import tensor_digest


def canonical_name(name: str) -> str:
    """The parameter's name in the module as the user wrote it, without the parts that wrappers add."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module not in WRAPPERS), last])


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the weights of a checkpoint. It is the same for weights of the module and of a wrapper around it."""
    return tensor_digest({canonical_name(name): tensor for name, tensor in weights.items()})
