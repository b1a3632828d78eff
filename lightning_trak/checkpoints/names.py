"""Names of parameters without what wrappers add."""

from lightning_trak.compatibility import WRAPPERS


def canonical_name(name: str) -> str:
    """The parameter's name in the module as the user wrote it, without the parts that wrappers add."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module not in WRAPPERS), last])
