"""Which outputs of a module belong to single examples, and which all examples share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_trak.gradients.hooks.capture import attached

# How a shared output gets a dimension of examples: its first one, of length 1, is expanded; or a new one is put first.
Expansion = Literal["expand", "unsqueeze"]


class SharedOutputs(NamedTuple):
    """What was found out about the outputs of modules.

    Attributes:
        expansions: how to expand the outputs of each module whose outputs all examples share.
        refused: the reason why each module that cannot be hooked cannot.
    """

    expansions: dict[nn.Module, Expansion]
    refused: dict[nn.Module, str]


def expanded(tensor: Tensor, size: int, how: Expansion) -> Tensor:
    """Give every example its own view of a tensor that all examples share; nothing is copied."""
    if how == "unsqueeze":
        tensor = tensor.unsqueeze(0)
    return tensor.expand(size, *[-1] * (tensor.ndim - 1))


def find_shared_outputs(modules: list[nn.Module], forward: Callable[[int], Tensor]) -> SharedOutputs:
    """Compare the modules' output shapes between a batch of one and a batch of two.

    An output of the same shape, such as an embedding of positions, is shared: the model broadcasts it later, and its
    gradient is a sum over examples. Expanding it must leave the model's outputs as they are.

    Args:
        modules: the modules to watch.
        forward: the outputs of the model on that many examples.
    """
    alone: dict[nn.Module, list[torch.Size]] = {module: [] for module in modules}

    def record(module: nn.Module, *call: Any) -> None:
        alone[module].append(call[-1].shape)

    ways: tuple[Expansion, ...] = ("expand", "unsqueeze")
    with torch.no_grad():
        with attached(modules, record):
            forward(1)
        expected = forward(2)
        for first_of_one in ways:
            comparison = _Comparison(alone, first_of_one)
            with attached(modules, comparison):
                outputs = _outputs(lambda: forward(2))
            found = comparison.result(complete=outputs is not None)
            if not found.expansions or (outputs is not None and _close(outputs[:1], expected[:1])):
                return found
    reason = "all examples share its output, and the model does not take one for each of them instead"
    return SharedOutputs({}, found.refused | dict.fromkeys(found.expansions, reason))


class _Comparison:
    """A forward hook for a batch of two, which expands every output that has the same shape as for one example.

    The engine's own pass expands them too, so what is computed from them has a dimension of examples there. The second
    example gets other numbers, which the first one's output must not depend on.

    Args:
        alone: output shapes on one example, call by call.
        first_of_one: how to expand an output whose first dimension is 1; all others can be expanded in one way only.
    """

    def __init__(self, alone: dict[nn.Module, list[torch.Size]], first_of_one: Expansion) -> None:
        self._alone = alone
        self._first_of_one = first_of_one
        self._expansions: dict[nn.Module, Expansion] = {}
        self._kinds: dict[nn.Module, set[str]] = {module: set() for module in alone}
        self._calls = dict.fromkeys(alone, 0)

    def __call__(self, module: nn.Module, *call: Any) -> Tensor | None:
        """Expand an output, or leave it as it is; for :func:`~lightning_trak.gradients.hooks.capture.attached`."""
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
        """What was found out.

        Args:
            complete: whether the forward pass came to its end.
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
