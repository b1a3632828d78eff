"""Checks the derivative of a gradient, which autograd does not always have.

Autograd takes what ``detach()`` and ``no_grad`` give as constants, and so what a custom backward computes outside of
the graph. Training follows such gradients. But when the weights move, these constants move too, and with them the
gradient. Autograd's derivative of the gradient lacks this part, and no error says so. Functions with
``once_differentiable`` lack all of it, and some operations of torch have a wrong one (``weight_norm`` on a CPU in torch
2.13).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_trak.checkpoints.copies import computed
from lightning_trak.gradients.precision import WorkingPrecision
from lightning_trak.outputs.evaluating import unchanged
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.texts.messages import in_one_line

# Relative to the size of each tensor. Between two kinks, of which a model may have millions, only small steps fit. In a
# model that rounds to float32 on its way, only large ones are seen.
_STEPS = (1e-8, 1e-6, 1e-3)
_TOLERANCE = 1e-3

CAUSES = (
    "Four causes are common: detach() or no_grad() around numbers that depend on the weights, a straight-through"
    " estimator, a custom autograd function, and torch's weight_norm and spectral_norm"
)


@contextmanager
def differentiating_twice(who: str, instead: str) -> Iterator[None]:
    """Explain PyTorch's error about an operation of the model that has no second derivative.

    Args:
        who: the subject of the message.
        instead: its last sentence, what to do.

    Raises:
        ValueError: in place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if "derivative for" not in str(error):
            raise
        reason = str(error).rstrip(".")
        raise ValueError(f"{who} differentiates the model twice, and PyTorch cannot: {reason}. {instead}") from error


def has_derivative(
    module: nn.Module,
    parameters: Iterable[Tensor],
    scalar: Callable[[nn.Module, Tensor], Tensor],
    variable: Tensor,
    by_parameters: bool = True,
) -> bool:
    """Whether autograd's derivative of a gradient is that of its differences, in float64.

    The gradient is that of a scalar by some parameters. Its derivative by these parameters, and by another variable, is
    compared along one random direction, as an inner product with a random vector. Weights whose gradient is exactly
    zero stay where they are, since training does not move them either: the row of ``nn.Embedding(padding_idx=)`` is
    read, but has no gradient. A gradient with jumps, or one that cannot be computed in float64, has no differences to
    compare with; it passes.

    Args:
        module: the module. A copy of it is used.
        parameters: those of its parameters that the gradient is by.
        scalar: of a module like this one in float64, and of the variable; shape ``()``.
        variable: a tensor that the scalar depends on, too.
        by_parameters: whether the derivative by the parameters is asked for; if not, only that by the variable.
    """
    gradient = _Gradient(module, parameters, scalar, variable, by_parameters)
    differences: list[float] = []
    try:
        exact = gradient.derivative()
        if not math.isfinite(exact):
            return True  # other code refuses what is not finite
        for step in _STEPS:
            differences.append(gradient.difference(step))
            if _near(differences[-1], exact):
                return True
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        kind = type(module).__name__
        rank_zero_info(f"the second derivative of {kind} was not checked in float64: {in_one_line(error)}")
        return True
    first, second, third = differences
    return not any(one and _near(one, other) for one, other in ((first, second), (second, third)))


class _Gradient:
    """The gradient of a scalar in float64, as its inner product with a random vector, along a random direction.

    The arguments are those of :func:`has_derivative`.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[Tensor],
        scalar: Callable[[nn.Module, Tensor], Tensor],
        variable: Tensor,
        by_parameters: bool,
    ) -> None:
        chosen = set(map(id, parameters))
        names = [name for name, parameter in module.named_parameters() if id(parameter) in chosen]
        self._scalar, self._module = scalar, copy.deepcopy(module, computed(module)).double()
        self._precision = WorkingPrecision(self._module)
        self._by = [self._module.get_parameter(name) for name in names]
        self._variable = variable.detach().double().requires_grad_()
        self._leaves = [self._variable, *(self._by if by_parameters else ())]
        generator = torch.Generator().manual_seed(0)
        self._vectors = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in self._by]
        self._along = [_direction(leaf, generator) for leaf in self._leaves]
        self._buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]

    def derivative(self) -> float:
        """Autograd's derivative of the inner product along the direction, which loses weights without a gradient."""
        slopes = self._slopes(create_graph=True)
        if len(self._along) > 1:
            self._along[1:] = [_moving(slope, way) for slope, way in zip(slopes, self._along[1:], strict=True)]
        product = self._product(slopes)
        if not product.requires_grad:
            return 0.0
        found = torch.autograd.grad(product, self._leaves, allow_unused=True)
        return sum(float((part * way).sum()) for part, way in zip(found, self._along, strict=True) if part is not None)

    def difference(self, step: float) -> float:
        """How much the inner product changes along the direction, by a step forwards and one backwards."""
        ends = []
        for sign in (1, -1):
            with _moved(self._leaves, self._along, sign * step):
                ends.append(float(self._product(self._slopes())))
        return (ends[0] - ends[1]) / (2 * step)

    def _slopes(self, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        with self._precision.active(), isolated_random_states(), unchanged(self._module), torch.enable_grad():
            value = self._scalar(self._module, self._variable)
            return torch.autograd.grad(value, self._by, create_graph=create_graph, allow_unused=True)

    def _product(self, slopes: Sequence[Tensor | None]) -> Tensor:
        with torch.enable_grad():
            pairs = zip(slopes, self._vectors, strict=True)
            terms = [(slope * vector).sum() for slope, vector in pairs if slope is not None]
            return torch.stack(terms).sum() if terms else self._variable.new_zeros(())


def _direction(leaf: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction, of the size of the tensor."""
    size = float(leaf.detach().norm()) / max(1, leaf.numel()) ** 0.5 or 1.0
    return size * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)


def _moving(slope: Tensor | None, along: Tensor) -> Tensor:
    """A direction without the weights that have no gradient."""
    return torch.zeros_like(along) if slope is None else torch.where(slope.detach() == 0, 0.0, along)


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other))


@contextmanager
def _moved(leaves: Sequence[Tensor], along: Sequence[Tensor], step: float) -> Iterator[None]:
    """Inside this context, tensors are a step away from where they were."""
    before = [leaf.detach().clone() for leaf in leaves]
    try:
        with torch.no_grad():
            for leaf, way in zip(leaves, along, strict=True):
                leaf.add_(way, alpha=step)
        yield
    finally:
        with torch.no_grad():
            for leaf, value in zip(leaves, before, strict=True):
                leaf.copy_(value)
