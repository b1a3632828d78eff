"""What an attributed output is: one number per example, and the training loss as a function of that number."""

from __future__ import annotations

import functools
import hashlib
import types
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.files import tensor_digest


class ModelOutput(ABC):
    """A scalar output f of the model per example, through which the training loss depends on the parameters.

    A subclass gives :meth:`output` and :meth:`loss`; the derivatives of the loss follow by autograd. Gradient engines
    call :meth:`output` under ``torch.func.vmap`` or with real batches, so it may not branch on the values of tensors.
    An example that has no output (an ignored label, say) should give NaN, which stops featurizing with its name.

    Attributes:
        context_size: number of training examples that :meth:`make_context` wants to see at each checkpoint.

    Example:
        >>> import torch
        >>> class SquaredError(ModelOutput):
        ...     def output(self, module, batch):
        ...         inputs, targets = batch
        ...         return module(inputs).squeeze(-1) - targets
        ...
        ...     def loss(self, output):
        ...         return output**2
        >>> SquaredError().derivatives(torch.tensor([1.0, -2.0]))
        (tensor([-2.,  4.]), tensor([2., 2.]))
    """

    context_size: int = 0

    @abstractmethod
    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The output of each example, differentiable in the module's parameters.

        Args:
            module: the model, in eval mode.
            batch: a batch as the dataloader gives it.

        Returns:
            Shape ``(batch,)``, in float32 or better.
        """

    @abstractmethod
    def loss(self, output: Tensor) -> Tensor:
        """The training loss of each example as a function of its output alone.

        Args:
            output: shape ``(batch,)``.

        Returns:
            Shape ``(batch,)``; entry i depends on ``output[i]`` only.
        """

    def derivatives(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Q = -dl/df and R = d2l/df2 of the loss l at the outputs f, by autograd; also inside inference mode.

        Args:
            output: shape ``(batch,)``; its graph is left alone.

        Returns:
            Q and R, each of shape ``(batch,)``, in float32 (float64 for float64 outputs).

        Raises:
            ValueError: if :meth:`loss` does not return one differentiable value per output.
        """
        with torch.inference_mode(False), torch.enable_grad():
            variable = _float_copy(output).requires_grad_()
            losses = self.loss(variable)
            name = f"{type(self).__name__}.loss"
            if not isinstance(losses, Tensor) or losses.shape != variable.shape:
                received = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ValueError(
                    f"{name} must return one loss per example: expected shape {tuple(variable.shape)}, the shape of the"
                    f" outputs it was given, received {received}; do not reduce over the batch"
                )
            if not losses.requires_grad:
                raise ValueError(
                    f"{name} must be differentiable in its argument, received a tensor without gradient; compute it"
                    " from `output` by torch operations, without detach() or item()"
                )
            (slope,) = torch.autograd.grad(losses.sum(), variable, create_graph=True, materialize_grads=True)
            # A linear loss has a constant slope, which autograd does not track; its curvature is exactly zero.
            curvature = torch.zeros_like(slope)
            if slope.requires_grad:
                (curvature,) = torch.autograd.grad(slope.sum(), variable, materialize_grads=True)
            return -slope.detach(), curvature

    def same_in_batch(self, module: nn.Module, batch: Any, alone: Tensor, tolerance: float) -> bool:
        """Whether the outputs of some examples in one batch are those that each has alone.

        Args:
            module: the model, in eval mode.
            batch: the examples.
            alone: the output of each of them in a batch of one, shape ``(batch,)``.
            tolerance: relative to outputs, and absolute for small ones.
        """
        return close(self.output(module, batch), alone, tolerance)

    def make_context(self, module: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
        """What the output needs to know of other training examples at one checkpoint; nothing by default.

        Args:
            module: the model at this checkpoint, in eval mode.
            batches: batches of training examples, ``context_size`` in all.

        Returns:
            Tensors by name, for :meth:`set_context`.
        """
        del module, batches
        return {}

    def set_context(self, context: dict[str, Tensor]) -> None:
        """Install what :meth:`make_context` returned, before outputs at that checkpoint are computed."""
        if context:
            raise ValueError(f"{type(self).__name__} takes no context, received {', '.join(context)}")

    def fingerprint(self) -> dict[str, Any]:
        """Identity of this output, in JSON's types: features made with another output must not be mixed with its own.

        The class and its public instance attributes; functions stand by name and a digest of their code, modules by
        their options and weights. What a function takes from its surroundings is not seen, nor are attributes whose
        name begins with an underscore.

        Raises:
            TypeError: if an attribute is neither a primitive, a function, a module nor a container of them.
        """
        configuration = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"class": _qualified_name(type(self)), **_describe(configuration, type(self).__name__)}


def close(values: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether outputs agree, NaN with NaN, up to a tolerance that is relative, and absolute for small ones."""
    return values.shape == expected.shape and torch.allclose(
        values.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def _float_copy(output: Tensor) -> Tensor:
    """A detached copy in float32 or better, which autograd can save even if ``output`` is an inference tensor."""
    return output.detach().clone().to(torch.promote_types(output.dtype, torch.float32))


def _qualified_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _describe(value: Any, owner: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_describe(item, owner) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _describe(item, owner) for key, item in value.items()}
    if isinstance(value, nn.Module):
        return [tensor_digest(value.state_dict()), *(_settings(part) for part in value.modules())]
    if isinstance(value, functools.partial):
        return _describe([value.func, value.args, value.keywords], owner)
    if isinstance(value, (types.FunctionType, types.MethodType)):
        return f"{_qualified_name(value)} {_code_digest(value.__code__)}"
    if hasattr(value, "__qualname__"):  # classes and builtins
        return _qualified_name(value)
    raise TypeError(
        f"{owner} holds a {type(value).__name__}, which its fingerprint cannot describe; expected primitives,"
        " functions, modules and containers of them: override fingerprint(), or begin the attribute's name with an"
        " underscore if it does not change the output"
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's class and options, which its ``repr`` need not show."""
    primitive = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    return {"class": _qualified_name(type(module)), **{name: primitive[name] for name in primitive if name[0] != "_"}}


def _code_digest(code: types.CodeType) -> str:
    """Tells functions of one name apart, such as two lambdas, by what they do and with which constants."""
    constants = [
        _code_digest(item)
        if isinstance(item, types.CodeType)
        else repr(sorted(item, key=repr))
        if isinstance(item, frozenset)
        else repr(item)
        for item in code.co_consts
    ]
    return hashlib.sha256(repr((code.co_code, constants, code.co_names)).encode()).hexdigest()[:16]
