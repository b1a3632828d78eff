"""Which outputs of a module belong to single examples, and which all examples share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Hook = Callable[..., Tensor | None]  # (module, args, kwargs, output) -> another output, or None
# How a shared output gets a dimension of examples: its first one, of length 1, is expanded; or a new one is put first.
Spread = Literal["expand", "unsqueeze"]


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Hook) -> Iterator[None]:
    """Call ``hook`` after the forward of each module, before the user's own hooks; nothing stays behind."""
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def spread(tensor: Tensor, size: int, how: Spread) -> Tensor:
    """Give every example its own (unmaterialised) copy of a tensor that they share."""
    if how == "unsqueeze":
        tensor = tensor.unsqueeze(0)
    return tensor.expand(size, *[-1] * (tensor.ndim - 1))


def find_shared(
    modules: list[nn.Module], forward: Callable[[int], Tensor]
) -> tuple[dict[nn.Module, Spread], dict[nn.Module, str]]:
    """Compare the modules' output shapes between a batch of one and a batch of two.

    An output of the same shape, such as an embedding of positions, is shared: the model broadcasts it later, so that
    its gradient comes summed over examples. Spreading it over them must leave the model's outputs as they are.

    Args:
        modules: the modules to watch.
        forward: the outputs of the model on that many examples.

    Returns:
        How to spread the outputs of each module that shares them, and the reason why each module that cannot be hooked
        cannot.
    """
    alone: dict[nn.Module, list[torch.Size]] = {module: [] for module in modules}

    def record(module: nn.Module, *call: Any) -> None:
        alone[module].append(call[-1].shape)

    with torch.no_grad():
        with hooked(modules, record):
            forward(1)
        expected = forward(2)
        for one in ("expand", "unsqueeze"):
            spreads, refused, outputs = _spread_on_two(alone, forward, one)
            if not spreads or (outputs is not None and _close(outputs[:1], expected[:1])):
                return spreads, refused
    reason = "all examples share its output, and the model does not take one for each of them instead"
    return {}, refused | dict.fromkeys(spreads, reason)


def _spread_on_two(
    alone: dict[nn.Module, list[torch.Size]], forward: Callable[[int], Tensor], one: Spread
) -> tuple[dict[nn.Module, Spread], dict[nn.Module, str], Tensor | None]:
    """Run the model on two examples, and spread every output that has the shape which it has for one example.

    So it is in the real pass: what is computed from it has a dimension of examples, too. The second example gets other
    numbers, which the first one's output must not depend on.

    Args:
        alone: output shapes on one example, call by call.
        forward: runs the model.
        one: how to spread an output whose first dimension is 1; of no other one is there a choice.

    Returns:
        How the outputs of modules were spread, why others cannot be hooked, and the model's outputs, if it took them.
    """
    spreads: dict[nn.Module, Spread] = {}
    kinds: dict[nn.Module, set[str]] = {module: set() for module in alone}
    counts = dict.fromkeys(alone, 0)

    def compare(module: nn.Module, *call: Any) -> Tensor | None:
        output: Tensor = call[-1]
        counts[module] += 1
        if counts[module] > len(alone[module]):
            return None
        before = alone[module][counts[module] - 1]
        if output.shape == before:
            kinds[module].add("shared")
            how = spreads.setdefault(module, one if before[:1] == (1,) else "unsqueeze")
            spread_out = spread(output, 2, how).clone()
            spread_out[1] *= 1.5
            return spread_out
        if output.ndim == len(before) and output.shape[1:] == before[1:] and len(output) == 2 * before[0]:
            kinds[module].add("examples")
        else:
            kinds[module].add(f"its output had shape {tuple(before)} for one example and {tuple(output.shape)} for two")
        return None

    with hooked(alone, compare):
        outputs = _outputs(lambda: forward(2))
    refused = {}
    for module, found in kinds.items():
        if outputs is not None and counts[module] != len(alone[module]):
            refused[module] = f"it was called {len(alone[module])} times on one example and {counts[module]} on two"
        elif found == {"shared", "examples"}:
            refused[module] = "examples share some of its outputs and not others"
        elif found - {"shared", "examples"}:
            refused[module] = sorted(found - {"shared", "examples"})[0]
    return {module: how for module, how in spreads.items() if module not in refused}, refused, outputs


def _outputs(forward: Callable[[], Tensor]) -> Tensor | None:
    try:
        return forward()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # shapes do not fit
        return None


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
