"""Finds out which outputs of a module belong to single examples, and which outputs all examples share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_trak.gradients.hooks.capture import attached

# How a shared output gets a dimension for examples: its first dimension, of length 1, is expanded, or a new first
# dimension is added.
Expansion = Literal["expand", "unsqueeze"]


class SharedOutputs(NamedTuple):
    """Modules with outputs that all examples share.

    Attributes:
        expansions: these modules, and how to expand their outputs.
        refused: modules that cannot have hooks, each with the reason.
    """

    expansions: dict[nn.Module, Expansion]
    refused: dict[nn.Module, str]


def expanded(tensor: Tensor, size: int, how: Expansion) -> Tensor:
    """Give every example its own view of a tensor that all examples share. Nothing is copied."""
    if how == "unsqueeze":
        tensor = tensor.unsqueeze(0)
    return tensor.expand(size, *[-1] * (tensor.ndim - 1))


def find_shared_outputs(modules: list[nn.Module], forward: Callable[[int], Tensor]) -> tuple[SharedOutputs, Tensor]:
    """Compare the modules' output shapes for a batch of one example and a batch of two.

    If the shape is the same, as for an embedding of positions, all examples share the output. The model broadcasts it
    later, and its gradient is a sum over examples. The model's outputs must stay the same when it is expanded.

    Args:
        modules: the modules to compare.
        forward: returns the outputs of the model for a batch of the given number of examples.

    Returns:
        What was found, and the model's outputs for a batch of two.
    """
    alone: dict[nn.Module, list[torch.Size]] = {module: [] for module in modules}

    def record(module: nn.Module, *call: Any) -> None:
        alone[module].append(call[-1].shape)

    ways: tuple[Expansion, ...] = ("expand", "unsqueeze")
    with torch.no_grad():
        with attached(modules, record):
            forward(1)
        expected = cache(lambda: forward(2))  # raises the model's own error, if it has one
        for first_of_one in ways:
            comparison = _Comparison(alone, first_of_one)
            with attached(modules, comparison):
                outputs = _outputs(lambda: forward(2))
            found = comparison.result(complete=outputs is not None)
            if outputs is not None and not found.expansions:
                return found, outputs
            if not found.expansions or (outputs is not None and _close(outputs[:1], expected()[:1])):
                return found, expected()
        reason = "all examples share its output, and the model does not accept a separate output for each example"
        return SharedOutputs({}, found.refused | dict.fromkeys(found.expansions, reason)), expected()


class _Comparison:
    """A forward hook for a batch of two. It expands every output that has the same shape as for one example.

    The engine's own pass expands these outputs, too. So tensors that are computed from them have a dimension for
    examples. The second example gets other numbers; the model's output for the first one must not depend on them.

    Args:
        alone: output shapes for one example, call by call.
        first_of_one: how to expand an output with a first dimension of length 1. All others can be expanded in one way
            only.
    """

    def __init__(self, alone: dict[nn.Module, list[torch.Size]], first_of_one: Expansion) -> None:
        self._alone = alone
        self._first_of_one = first_of_one
        self._expansions: dict[nn.Module, Expansion] = {}
        self._kinds: dict[nn.Module, set[str]] = {module: set() for module in alone}
        self._calls = dict.fromkeys(alone, 0)

    def __call__(self, module: nn.Module, *call: Any) -> Tensor | None:
        """Expand a shared output. For use with :func:`~lightning_trak.gradients.hooks.capture.attached`."""
        output: Tensor = call[-1]
        number = self._calls[module]
        self._calls[module] += 1
        if number >= len(self._alone[module]):
            return None
        before = self._alone[module][number]
        if output.shape == before:
            self._kinds[module].add("shared")
            how = self._expansions.setdefault(module, self._first_of_one if before[:1] == (1,) else "unsqueeze")
            pair = expanded(output, 2, how).clone()
            pair[1] *= 1.5
            return pair
        if output.ndim == len(before) and output.shape[1:] == before[1:] and len(output) == 2 * before[0]:
            self._kinds[module].add("examples")
        else:
            self._kinds[module].add(
                f"its output had shape {tuple(before)} for one example and {tuple(output.shape)} for two"
            )
        return None

    def result(self, *, complete: bool) -> SharedOutputs:
        """The shared outputs, and the modules that cannot have hooks.

        Args:
            complete: whether the forward pass ended without an error.
        """
        refused = {}
        for module, kinds in self._kinds.items():
            expected = len(self._alone[module])
            if complete and self._calls[module] != expected:
                refused[module] = f"it was called {expected} times on one example and {self._calls[module]} on two"
            elif kinds == {"shared", "examples"}:
                refused[module] = "examples share some of its outputs and not others"
            elif kinds - {"shared", "examples"}:
                refused[module] = sorted(kinds - {"shared", "examples"})[0]
        return SharedOutputs({m: how for m, how in self._expansions.items() if m not in refused}, refused)


def _outputs(forward: Callable[[], Tensor]) -> Tensor | None:
    try:
        return forward()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # shapes do not fit
        return None


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-5, equal_nan=True)
