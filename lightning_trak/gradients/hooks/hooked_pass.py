"""The state of the hooks in one forward pass over a batch and in its backward passes."""

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
    """One call of a tracked module in the forward pass, and norms from the backward passes.

    Attributes:
        tracked: the module.
        rows: the number of rows of its output for each example.
        input_shape: shape of its input.
        output_shape: shape of its output.
        weighted_norms: norms of the rows of the output's gradient, in the pass that gives examples different weights.
        norms: the same norms in the pass where all weights are 1; set only if ``weighted_norms`` is set.
    """

    tracked: TrackedModule
    rows: int
    input_shape: torch.Size
    output_shape: torch.Size
    weighted_norms: Tensor | None = None
    norms: Tensor | None = None


class HookedPass:
    """One pass with hooks: attach :meth:`on_forward` to the tracked modules, run the model, then call :meth:`backward`.

    Args:
        tracked: the modules that the hook is attached to.
        size: the number of examples.
        expansions: the modules with outputs that all examples share, and how to expand these outputs.
        receive: called in :meth:`backward` for each call of a tracked module.

    Attributes:
        has_received: whether ``receive`` was called.
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
        self.has_received = False
        # All outputs depend on it. So the backward pass reaches layers with constant inputs and weights, too.
        self._anchor = torch.zeros((), requires_grad=True)

    @property
    def signatures(self) -> tuple[Signature, ...]:
        """For each call so far: path, rows for each example, and shapes of input and output."""
        return tuple((call.tracked.path, call.rows, call.input_shape, call.output_shape) for call in self._calls)

    def on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """The forward hook: record the call, and capture the output's gradient in backward passes.

        Raises:
            EngineError: if the output's rows cannot be divided equally among the examples.
        """
        if output.numel() == 0:
            return output  # such as an expert that gets no tokens
        tracked = self._tracked[module]
        inputs = tracked.layer.inputs_of(args, kwargs)
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
        input_gradient = None if how is not None else tracked.layer.input_gradient()
        if input_gradient is not None:
            output = output.detach()
        captured: Tensor = CaptureOutputGradient.apply(  # type: ignore[no-untyped-call]
            output, self._anchor, inputs, partial(self._on_backward, call), input_gradient
        )
        return captured

    def _on_backward(self, call: _Call, inputs: Tensor, gradient: Tensor) -> None:
        if self._weighted:
            call.weighted_norms = row_norms(gradient)
            return
        if call.weighted_norms is not None:
            call.norms = row_norms(gradient)
        if inputs.is_floating_point():  # indices stay as they are
            inputs = inputs.to(gradient.dtype)
        self.has_received = True
        self._receive(call.tracked, LayerCall(inputs, gradient, self._size))

    def backward_weighted(self, outputs: Tensor, weights: Tensor) -> None:
        """A backward pass with weights, for :meth:`require_owned`. Call it before :meth:`backward`.

        Args:
            outputs: the model's outputs, shape ``(size,)``.
            weights: the weight of each output, shape ``(size,)``.
        """
        self._weighted = True
        torch.autograd.grad(outputs, self._anchor, weights, retain_graph=True, allow_unused=True)
        self._weighted = False

    def backward(self, outputs: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[Tensor | None, ...]:
        """The backward pass that calls ``receive`` for each call of a tracked module.

        Args:
            outputs: the model's outputs, shape ``(size,)``.
            parameters: parameters that are differentiated as usual in the same pass.

        Returns:
            The gradients of these parameters; None if the outputs do not depend on a parameter.
        """
        return torch.autograd.grad(outputs.sum(), [self._anchor, *parameters], allow_unused=True)[1:]

    def require_owned(self, weights: Tensor, tolerance: float) -> None:
        """Check that the rows of each output belong to the examples that hooks assume.

        Args:
            weights: the weights of :meth:`backward_weighted`.
            tolerance: the largest difference, relative to the largest gradient.

        Raises:
            EngineError: if a row belongs to another example.
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
