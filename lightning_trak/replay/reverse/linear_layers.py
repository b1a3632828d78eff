"""Linear layers in the graph of a gradient, whose weights autograd does not see.

A linear layer maps inputs x to x W^T, and its gradient is g^T x for the derivatives g of the loss by its results. To
multiply many cotangents V of the gradient by its derivative, autograd would make a tensor of the size of all weights
for each of them, and add it to those of the steps before. Here autograd goes from x and g to the results, to g W and to
all before them: tensors of the size of a batch. Products with V and the sums over the batch are single products of
matrices, in the memory of the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override


class _Call(NamedTuple):
    """A call of ``F.linear``: names of its parameters, and its tensors in the graph; see :class:`LinearGradient`."""

    weight: str
    bias: str | None
    inputs: Tensor
    results: Tensor


class LinearCalls(TorchFunctionMode):
    """A mode in which calls of ``F.linear`` with some parameters are noted, and get these parameters without a graph.

    Args:
        parameters: by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {parameter: name for name, parameter in parameters.items()}
        self._calls: list[_Call] = []

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (self._linear if func is F.linear else func)(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight not in self._names or (bias is not None and bias not in self._names):
            return F.linear(input, weight, bias)
        inputs = input.clone()  # no other operation uses the clones, or changes them in place
        results = F.linear(inputs, weight.detach(), None if bias is None else bias.detach())
        if not results.requires_grad:
            results.requires_grad_()
        self._calls.append(_Call(self._names[weight], None if bias is None else self._names[bias], inputs, results))
        return results.clone()

    def differentiate(
        self, total: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor | None], list[LinearGradient]]:
        """Differentiate a number that was computed in this mode.

        Args:
            total: the number.
            parameters: what to differentiate it by.

        Returns:
            Derivatives by the parameters, those of the noted calls left out; None if there are no others. And those of
            the calls.
        """
        calls = self._calls
        inside = [call.inputs for call in calls if call.inputs.requires_grad]
        wanted = [*parameters, *(call.results for call in calls), *inside]
        found = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True) if wanted else ()
        own, by_results = found[: len(parameters)], found[len(parameters) : len(parameters) + len(calls)]
        by_inputs = iter(found[len(parameters) + len(calls) :])
        layers = []
        for call, slope in zip(calls, by_results, strict=True):
            backward = next(by_inputs) if call.inputs.requires_grad else None
            if slope is not None:
                layers.append(LinearGradient(*call, slope, backward))
        return own, layers


class LinearGradient(NamedTuple):
    """A linear layer in the graph of a gradient.

    Attributes:
        weight: name of its weight.
        bias: name of its bias; None if it has none.
        inputs: its inputs, ``(..., num_inputs)``.
        results: its results, ``(..., num_results)``.
        by_results: the derivatives of the loss by the results.
        by_inputs: those by the inputs; None if the inputs do not depend on parameters.
    """

    weight: str
    bias: str | None
    inputs: Tensor
    results: Tensor
    by_results: Tensor
    by_inputs: Tensor | None

    @property
    def leaves(self) -> list[Tensor]:
        """What the graph is to be differentiated by."""
        return [self.results] if self.by_inputs is None else [self.results, self.by_inputs]

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients of weight and bias, by name."""
        slopes = _rows(self.by_results)
        yield self.weight, slopes.T @ _rows(self.inputs)
        if self.bias is not None:
            yield self.bias, slopes.sum(0)

    def cotangents(self, by_gradient: Mapping[str, Tensor], count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tensors of the graph, and their cotangents ``(count, *shape)``.

        Args:
            by_gradient: cotangents of the gradients of parameters, by name.
            count: how many they are.
        """
        by_weight = by_gradient.get(self.weight)
        by_bias = None if self.bias is None else by_gradient.get(self.bias)
        found: Tensor | None = None
        if by_weight is not None:
            inputs = _rows(self.inputs).expand(count, -1, -1)
            if by_bias is None:
                found = torch.bmm(inputs, by_weight.mT)
            else:
                found = torch.baddbmm(by_bias.unsqueeze(1), inputs, by_weight.mT)
            if self.by_inputs is not None:
                backward = torch.bmm(_rows(self.by_results).expand(count, -1, -1), by_weight)
                yield self.inputs, backward.view(count, *self.inputs.shape)
        elif by_bias is not None:
            found = by_bias.unsqueeze(1).expand(-1, len(_rows(self.results)), -1)
        if found is not None:
            yield self.by_results, found.reshape(count, *self.results.shape)

    def add(self, found: Sequence[Tensor | None], to: Mapping[str, Tensor]) -> None:
        """Add the derivatives by weight and bias to those of other layers and steps.

        Args:
            found: derivatives by the :attr:`leaves`, for some cotangents.
            to: sums by the names of parameters, for the same cotangents.
        """
        by_results, *others = found
        if by_results is not None:
            slopes = by_results.reshape(len(by_results), -1, by_results.shape[-1])
            to[self.weight].baddbmm_(slopes.mT, _rows(self.inputs).expand(len(slopes), -1, -1))
            if self.bias is not None:
                to[self.bias].add_(slopes.sum(1))
        for other in others:
            if other is not None:
                backward = other.reshape(len(other), -1, other.shape[-1])
                to[self.weight].baddbmm_(_rows(self.by_results).T.expand(len(backward), -1, -1), backward)


def _rows(tensor: Tensor) -> Tensor:
    """Values as a matrix, whose last dimension is that of the tensor."""
    return tensor.detach().reshape(-1, tensor.shape[-1])
