"""The base class of gradient engines: gradients of the declared output, one row per example."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.precision import explained_precision
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, unchanged
from lightning_trak.projections.base import BoundProjection


class EngineError(ValueError):
    """An engine cannot differentiate a model correctly. Another engine may be able to.

    Args:
        message: what is wrong.
        parameters: the canonical names of the parameters with wrong gradients, if they are known.
    """

    def __init__(self, message: str, parameters: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.parameters = tuple(parameters)


@contextmanager
def differentiating(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside this context, only these parameters of the module require gradients."""
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for parameter in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def real_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter's gradient in real numbers. A complex number is a pair."""
    return torch.Size((*parameter.shape, 2)) if parameter.is_complex() else parameter.shape


def in_real_numbers(gradient: Tensor) -> Tensor:
    """A gradient as a dense tensor of real numbers, of :func:`real_shape`."""
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


class GradientEngine(ABC):
    """Per-example gradients of a model output.

    Call it outside inference mode, on a module in eval mode. It does not change the batch, nor the module's attributes,
    parameters, ``.grad`` and buffers.

    Args:
        module: the model.
        output: the scalar output that is differentiated.
        names: canonical parameter name -> name in ``module``. Only these parameters are differentiated.
        autocast: the dtype of autocast in forward passes, as with mixed precision, if the engine supports it.
    """

    def __init__(
        self, module: nn.Module, output: ModelOutput, names: dict[str, str], autocast: torch.dtype | None = None
    ) -> None:
        self.module = module
        self.output = output
        parameters = dict(module.named_parameters())
        self.parameters = {name: parameters[raw] for name, raw in names.items()}
        self.names = names
        self.autocast = autocast

    @abstractmethod
    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiate each example's output.

        Args:
            batch: the examples.

        Returns:
            The outputs, shape ``(size,)``, and the gradients by canonical name, shape ``(size, numel)``. A complex
            element counts as two.

        Raises:
            EngineError: if the engine cannot differentiate the model correctly.
        """

    def project(self, batch: ExampleBatch, projection: BoundProjection, features: Tensor) -> Tensor:
        """Differentiate each example's output and add the projected gradients to its feature.

        Args:
            batch: the examples.
            projection: a projection that is bound to the parameters.
            features: features so far, shape ``(size, dim)``, float32 or float64; changed in place.

        Returns:
            The outputs, shape ``(size,)``.

        Raises:
            EngineError: if the engine cannot differentiate the model correctly. Do not use ``features`` then.
        """
        values, gradients = self(batch)
        for name, rows in gradients.items():
            projection.add_(features, name, rows)
        return values

    def outputs(self, batch: ExampleBatch) -> Tensor:
        """The outputs of a batch. Module and batch are not changed.

        Raises:
            ValueError: if the outputs are not a tensor of real numbers, or if one example alone has no output.
        """
        with self._computing():
            try:
                values = self.output.output(self.module, batch.fresh())
            except ValueError as error:
                if "Expected more than 1 value per channel" not in str(error):
                    raise
                raise ValueError(
                    f"{type(self.module).__name__} has no output for one example alone, since batch normalisation"
                    f" without running statistics needs the rest of the batch ({error}). Use track_running_stats=True"
                    " or another normalisation"
                ) from error
        if not isinstance(values, Tensor):
            raise ValueError(
                f"{type(self.output).__name__}.output returned a {type(values).__name__}; expected a Tensor with one"
                " number per example"
            )
        if values.is_complex():
            raise ValueError(
                f"{type(self.output).__name__}.output returned complex numbers; expected one real number per example,"
                " such as an absolute value"
            )
        return values

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.parameters.values())).device

    @property
    def precision(self) -> torch.dtype:
        """The coarsest dtype that forward passes compute in. A layer, also a frozen one, may have one of its own."""
        dtypes = {p.dtype.to_real() for p in self.module.parameters() if p.is_floating_point() or p.is_complex()}
        return self.autocast or max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def rounding(self) -> float:
        """The largest relative difference of two gradients that rounding alone explains, away from kinks.

        Accelerators may compute float32 as TF32, which has 10 bits.
        """
        single = 1e-3 if self.device.type == "cpu" else 1e-2
        return {torch.float64: 1e-7, torch.float32: single}.get(self.precision, 0.05)

    def same_in_batch(self, batch: ExampleBatch, alone: Tensor, tolerance: float) -> bool:
        """See :meth:`ModelOutput.same_in_batch <lightning_trak.outputs.ModelOutput.same_in_batch>`."""
        with self._computing(), torch.enable_grad():
            return self.output.same_in_batch(self.module, batch.fresh(), alone, tolerance)

    def suspicion(self, batch: ExampleBatch) -> str | None:
        """See :meth:`ModelOutput.suspicion <lightning_trak.outputs.ModelOutput.suspicion>`."""
        with self._computing(), torch.enable_grad():
            return self.output.suspicion(self.module, batch.fresh())

    def on(self, module: nn.Module, output: ModelOutput) -> Self:
        """The same engine for a copy of the module and the output, without autocast."""
        return type(self)(module, output, self.names)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with (
            unchanged(self.module, self.output),
            exact_attention(),
            torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None),
            explained_precision(self.module),
        ):
            yield

    def _require_one_each(self, values: Tensor, size: int) -> None:
        if values.shape != (size,):
            examples = "one example" if size == 1 else f"{size} examples"
            raise ValueError(
                f"{type(self.output).__name__}.output returned shape {tuple(values.shape)} for a batch of {examples};"
                f" expected ({size},): one scalar per example"
            )
