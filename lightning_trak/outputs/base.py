"""What an attributed output is: one number per example, and the training loss as a function of that number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.fingerprints import object_fingerprint

# Features do not depend on what these methods tell people.
_NOT_IDENTITY = frozenset(["fingerprint", "prediction", "describe_prediction", "explain_nan", "suspicion"])


class ModelOutput(ABC):
    """A scalar output f of the model per example, through which the training loss depends on the parameters.

    A subclass gives :meth:`output` and :meth:`loss`; the derivatives of the loss follow by autograd. Gradient engines
    call :meth:`output` under ``torch.func.vmap`` or with real batches. Where it branches on the values of tensors,
    examples that take different paths are computed apart, or one by one.
    The output of an example that has none (an ignored label, say) should be NaN: featurizing then stops and names it.

    Attributes:
        context_size: number of training examples that :meth:`make_context` wants to see at each checkpoint.
        for_targets: whether it is an output of targets alone, because training did not act on it.
        predicts_labels: whether labels are what the model predicts. Of several checkpoints, the class with the highest
            mean of :meth:`probabilities` is then the label at all of them: batches come as
            :class:`~lightning_trak.running.data.annotated.AnnotatedBatch`.
        numbered: whether it depends on the position of an example in the training set: batches come as AnnotatedBatch,
            with positions as their notes.
        averages: whether the loss may be a mean over several predictions for an example, such as its tokens. R is then
            not the variance of Q, and the automatic damping does not follow the
            :mod:`~lightning_trak.scoring.newton.lag`.

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
    for_targets: bool = False
    predicts_labels: bool = False
    numbered: bool = False
    averages: bool = False

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

    def probabilities(self, module: nn.Module, batch: Any) -> Tensor:
        """The probability of each class, for outputs with ``predicts_labels``.

        Args:
            module: the model, in eval mode.
            batch: a batch as the dataloader gives it.

        Returns:
            Shape ``(batch, classes)``.

        Raises:
            TypeError: if the output predicts no labels.
        """
        del module, batch
        raise TypeError(f"{type(self).__name__} predicts no labels")

    def prediction(self, module: nn.Module, batch: Any) -> Tensor | None:
        """What the model predicts for each example, in numbers that :meth:`describe_prediction` turns into words.

        Those of several checkpoints are averaged. By default there are none.

        Args:
            module: the model, in eval mode.
            batch: a batch as the dataloader gives it, which need not have labels.

        Returns:
            Shape ``(batch, n)`` with finite numbers; None if a prediction of this output has no meaning for people.
        """
        del module, batch
        return None

    def describe_prediction(self, prediction: Tensor) -> str:
        """The prediction for an example in words, beside the truth where that is known.

        Args:
            prediction: a row of :meth:`prediction`, shape ``(n,)``.
        """
        return ", ".join(f"{number:g}" for number in prediction.tolist())

    def same_in_batch(self, module: nn.Module, batch: Any, alone: Tensor, tolerance: float) -> bool:
        """Whether the outputs of some examples in one batch are those that each has alone.

        Args:
            module: the model, in eval mode.
            batch: the examples.
            alone: the output of each of them in a batch of one, shape ``(batch,)``.
            tolerance: relative to outputs, and absolute for small ones.
        """
        return close(self.output(module, batch), alone, tolerance)

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Why an example has no output, as the end of an error about it, such as "its label is 7, ..."; default: None.

        Unlike :meth:`output`, this may look at the values of tensors. It is called without gradients, after the output
        came out as NaN.

        Args:
            module: the model, in eval mode.
            batch: a batch of this example alone.
        """
        del module, batch
        return None

    def suspicion(self, module: nn.Module, batch: Any) -> str | None:
        """What the module probably returns by mistake, for a warning before long work; default: None.

        Unlike :meth:`output`, this may look at the values of tensors.

        Args:
            module: the model, in eval mode.
            batch: a batch of one example.
        """
        del module, batch
        return None

    def make_context(self, module: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
        """What the output depends on beside the example: tensors from other training examples; nothing by default.

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

        Its class, its attributes and the code of its methods, with all functions and values that they refer to. Methods
        that only make texts for people are left out. Code of installed packages stands by its name. Attributes that its
        own methods assign, such as counters, are left out, and those that begin with an underscore unless a method
        reads them.

        Raises:
            TypeError: if a public attribute holds what has no content, such as a lock or an open file.
        """
        return object_fingerprint(self, called=frozenset(vars(ModelOutput)), left_out=_NOT_IDENTITY)


def close(values: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether outputs agree, NaN with NaN, up to a tolerance that is relative, and absolute for small ones."""
    return values.shape == expected.shape and torch.allclose(
        values.detach().double(), expected.detach().double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def better_when_higher(output: ModelOutput) -> bool:
    """Whether the loss never rises with the output, by its slope at some values. It does with a residual."""
    slopes, _ = output.derivatives(torch.linspace(-8, 8, 33))
    return bool((slopes >= 0).all())


def _float_copy(output: Tensor) -> Tensor:
    """A detached copy in float32 or better, which autograd can save even if ``output`` is an inference tensor."""
    return output.detach().clone().to(torch.promote_types(output.dtype, torch.float32))
