"""The hooks' state in one forward pass over a batch, and in the backward passes after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.hooks.capture import CaptureOutputGradient
from lightning_trak.gradients.hooks.layers import LayerCall
from lightning_trak.gradients.hooks.ownership import misplaced, row_norms
from lightning_trak.gradients.hooks.shared_outputs import Expansion, expanded
from lightning_trak.gradients.hooks.tracked_module import TrackedModule

Receive = Callable[[TrackedModule, LayerCall], None]
Signature = tuple[str, int, torch.Size, torch.Size]


@dataclass(eq=False)
class _Call:
    """One call of a tracked module in the forward pass, and what the backward passes find.

    Attributes:
        tracked: the module.
        rows: the rows of its output that each example has.
        input_shape: of its input.
        output_shape: of its output.
        weighted_norms: of the rows of the output's gradient where each example's output has a weight.
        norms: the same where all weights are 1; only if there are weighted norms.
    """

    tracked: TrackedModule
    rows: int
    input_shape: torch.Size
    output_shape: torch.Size
    weighted_norms: Tensor | None = None
    norms: Tensor | None = None


class HookedPass:
    """Attach :meth:`on_forward` to the tracked modules, run the model, then call :meth:`backward`.

    Args:
        tracked: the modules that the hook is attached to.
        size: the number of examples.
        expansions: the modules whose outputs all examples share.
        receive: called in :meth:`backward` for each call of a tracked module.
    """

    def __init__(
        self,
        tracked: Mapping[nn.Module, TrackedModule],
        size: int,
        expansions: Mapping[nn.Module, Expansion],
        receive: Receive,
    ) -> None:
        self._tracked = tracked
        self._size = size
        self._expansions = expansions
        self._receive = receive
        self._calls: list[_Call] = []
        self._weighted = False
        # All outputs depend on it, so that the backward pass reaches layers whose inputs and weights are constants.
        self._anchor = torch.zeros((), requires_grad=True)

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """The path, the rows of each example and the shapes of input and output, for each call so far."""
        return tuple((call.tracked.path, call.rows, call.input_shape, call.output_shape) for call in self._calls)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The forward hook: note the call, and capture the output's gradient in backward passes.

        Raises:
            EngineError: if the output's rows cannot be dealt out to the examples.
        """
        if output.numel() == 0:
            return output  # such as that of an expert that no token was sent to
        tracked = self._tracked[module]
        inputs = (*args, *kwargs.values())[0]
        how = self._expansions.get(module)
        if how is not None:
            inputs, output = expanded(inputs, self._size, how), expanded(output, self._size, how).clone()
        elif self._size > 1 and (output.ndim < 2 or len(output) % self._size):
            raise EngineError(
                f"{tracked.description} gave an output of shape {tuple(output.shape)} in a batch of {self._size}"
                f" examples; expected a multiple of {self._size} rows"
            )
        call = _Call(tracked, output.shape[:1].numel() // self._size, inputs.shape, output.shape)
        self._calls.append(call)
        captured: Tensor = CaptureOutputGradient.apply(  # type: ignore[no-untyped-call]
            output, self._anchor, inputs, partial(self._on_backward, call)
        )
        return captured

    def _on_backward(self, call: _Call, inputs: Tensor, gradient: Tensor) -> None:
        if self._weighted:
            call.weighted_norms = row_norms(gradient)
            return
        if call.weighted_norms is not None:
            call.norms = row_norms(gradient)
        if inputs.is_floating_point():  # not where they are indices
            inputs = inputs.to(gradient.dtype)
        self._receive(call.tracked, LayerCall(inputs, gradient, self._size))

    def backward_weighted(self, outputs: Tensor, weights: Tensor) -> None:
        """A backward pass before :meth:`backward`, for :meth:`require_owned`.

        Args:
            outputs: the model's outputs, shape ``(size,)``.
            weights: of the outputs, shape ``(size,)``.
        """
        self._weighted = True
        torch.autograd.grad(outputs, self._anchor, weights, retain_graph=True, allow_unused=True)
        self._weighted = False

    def backward(self, outputs: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """The backward pass in which layers are received.

        Args:
            outputs: the model's outputs, shape ``(size,)``.
            parameters: are differentiated in it as usual.

        Returns:
            The parameters' gradients; None where the outputs do not depend on them.
        """
        return torch.autograd.grad(outputs.sum(), [self._anchor, *parameters], allow_unused=True)[1:]

    def require_owned(self, weights: Tensor, tolerance: float) -> None:
        """Check that the rows of each output belong to the examples that they are taken for.

        Args:
            weights: of :meth:`backward_weighted`.
            tolerance: the largest difference, relative to the largest gradient.

        Raises:
            EngineError: if they do not.
        """
        for call in self._calls:
            if call.norms is None or call.weighted_norms is None:
                continue
            if misplaced(call.norms, call.weighted_norms, weights) > tolerance:
                raise EngineError(
                    f"rows of the output of {call.tracked.path}, of shape {tuple(call.output_shape)}, do not belong to"
                    f" the {self._size} examples of the batch in equal parts and in their order",
                    list(call.tracked.parameters.values()),
                )
