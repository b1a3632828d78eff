"""What a module has of its own, and that no hook is left on it."""

from torch import nn


def attributes(module: nn.Module) -> list[set[str]]:
    return [set(vars(part)) for part in module.modules()]


def assert_no_hooks(module: nn.Module) -> None:
    for part in module.modules():
        assert not any(value for name, value in vars(part).items() if "hooks" in name)
