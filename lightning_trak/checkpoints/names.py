"""What a parameter is called."""

# What torch.compile, FSDP and activation checkpointing put into a parameter's name without changing the parameter.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def canonical_name(name: str) -> str:
    """The parameter's name in the module as the user wrote it, without what wrappers add."""
    *modules, last = name.split(".")
    return ".".join([*(module for module in modules if module not in _WRAPPERS), last])
