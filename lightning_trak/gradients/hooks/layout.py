"""Where the examples are in a module's output: found by running the model on one example and on two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Hook = Callable[..., Tensor | None]  # (module, args, kwargs, output) -> another output, or None


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Call ``hook`` after the forward of each module, before the user's own hooks; nothing stays behind."""
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def spread(tensor: Tensor, size: int) -> Tensor:
    """Give every example its own (unmaterialised) copy of a tensor that they share."""
    return (tensor if len(tensor) == 1 else tensor.unsqueeze(0)).expand(
        size, *[-1] * (tensor.ndim - (len(tensor) == 1))
    )


def find_shared(
    modules: list[nn.Module], forward: Callable[[int], object]
) -> tuple[set[nn.Module], dict[nn.Module, str]]:
    """Compare the modules' output shapes between a batch of one and a batch of two.

    An output with as many rows per example holds the examples in its first dimension. One of the same shape, such as an
    embedding of positions, is shared: the model broadcasts it later, so that its gradient comes summed over examples.

    Args:
        modules: the modules to watch.
        forward: runs the model on that many examples.

    Returns:
        The modules with shared outputs, and the reason why each module that is neither cannot be hooked.
    """
    alone: dict[nn.Module, list[torch.Size]] = {module: [] for module in modules}
    kinds: dict[nn.Module, set[str]] = {module: set() for module in modules}

    def record(module: nn.Module, *call: Any) -> None:
        alone[module].append(call[-1].shape)

    def compare(module: nn.Module, *call: Any) -> Tensor | None:
        output = call[-1]
        before = alone[module].pop(0) if alone[module] else torch.Size()
        if output.shape == before:
            kinds[module].add("shared")
            return spread(output, 2)  # as in the real pass: what is computed from it has an example dimension
        if output.shape[1:] == before[1:] and len(output) == 2 * before[0]:
            kinds[module].add("examples")
        else:
            kinds[module].add(f"of shape {tuple(before)} for one example and {tuple(output.shape)} for two")
        return None

    with torch.no_grad():
        with hooked(modules, record):
            forward(1)
        with hooked(modules, compare):
            forward(2)
    shared = {module for module, found in kinds.items() if found == {"shared"}}
    refused = {
        module: f"expected outputs with the examples in their first dimension; they were {', '.join(sorted(found))}"
        for module, found in kinds.items()
        if found and found != {"shared"} and found != {"examples"}
    }
    return shared, refused
