"""The base class of layers: per-example gradients from a layer's input and the gradient of its output."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_trak.running.fsdp import own_type


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer on a batch, as the hooks see it.

    The first dimension of both tensors is ``size``, or a multiple of it where the model folded another dimension into
    the batch. The rows of one example follow each other, so ``reshape(size, -1, ...)`` separates the examples.

    Args:
        inputs: the layer's first argument, or what :meth:`Layer.inputs_of` makes of its arguments.
        output_gradient: the gradient of the sum of the model's outputs with respect to the layer's output.
        size: the number of examples.
    """

    inputs: Tensor
    output_gradient: Tensor
    size: int

    def take(self, start: int, stop: int) -> LayerCall:
        """The examples from ``start`` to ``stop``, without copying."""
        if stop - start == self.size:
            return self
        inputs, gradient = (
            tensor[start * tensor.shape[0] // self.size : stop * tensor.shape[0] // self.size]
            for tensor in (self.inputs, self.output_gradient)
        )
        return LayerCall(inputs, gradient, stop - start)

    def contiguous(self) -> LayerCall:
        """The same call with its tensors in order in memory."""
        return LayerCall(self.inputs.contiguous(), self.output_gradient.contiguous(), self.size)


class Layer(ABC):
    """Per-example gradients of one type of module. To add a type, derive a class that defines :meth:`gradient`.

    ``covers=[...]`` registers the class for these types of modules. Types must match exactly, since a subclass of a
    module may compute anything in its own ``forward``. If the ``forward`` of a subclass is the same, name it, too.

    All other methods have defaults. A class that defines them is faster or takes less memory.

    Below, a parameter's gradient is a matrix G. Its rows are the parameter's first dimension. Its columns are all other
    dimensions. A vector is a matrix of one column.

    Example:
        >>> import torch
        >>> from lightning_trak.gradients import HookEngine, Layer, select_parameters
        >>> from lightning_trak.gradients.batch import ExampleBatch
        >>> from lightning_trak.outputs import ClassificationMargin
        >>> class Gain(torch.nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.gain = torch.nn.Parameter(torch.ones(width))
        ...
        ...     def forward(self, x):
        ...         return self.gain * x
        >>> class GainLayer(Layer, covers=[Gain]):
        ...     parameter_names = ("gain",)
        ...
        ...     def gradient(self, parameter, call):
        ...         products = call.inputs * call.output_gradient
        ...         products = products.reshape(call.size, -1, products.shape[-1])
        ...         return products.sum(1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), Gain(3))
        >>> batch = ExampleBatch((torch.ones(2, 4), torch.tensor([0, 2])), 2)
        >>> parameters = select_parameters(model)
        >>> engine = HookEngine(model, ClassificationMargin(), parameters)
        >>> engine.check(batch)  # {}: the same as autograd
        {}

    Args:
        module: the module.

    Attributes:
        module: the module.
        parameter_names: the attributes of the module that hold the parameters for :meth:`gradient`.
        rows_are_inputs: whether the rows of the weight's matrix belong to the layer's inputs, and not to its outputs.
            It is used only for layers with :meth:`factors`.
    """

    parameter_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    rows_are_inputs: ClassVar[bool] = False
    module: nn.Module

    _by_type: ClassVar[dict[type[nn.Module] | str, type[Layer]]] = {}
    _by_structure: ClassVar[list[type[Layer]]] = []

    def __init_subclass__(
        cls, covers: list[type[nn.Module] | str] | None = None, covers_by_structure: bool = False
    ) -> None:
        """Register the subclass.

        Args:
            covers: the types of modules, or their names as ``"package.module.Type"``, which need not be importable.
            covers_by_structure: whether to use the class also for modules of types that no class covers, if the class
                :meth:`recognizes` them.
        """
        super().__init_subclass__()
        for module_type in covers or ():
            Layer._by_type[module_type] = cls
        if covers_by_structure:
            Layer._by_structure.append(cls)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @abstractmethod
    def gradient(self, parameter: str, call: LayerCall) -> Tensor:
        """The gradient of each example's output with respect to a parameter.

        Args:
            parameter: one of ``parameter_names``.
            call: the layer's input and its output's gradient.

        Returns:
            Shape ``(size, ...)``, with the elements of the parameter in its own order.
        """

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:  # noqa: ARG003
        """Whether this class may be used for a module of a type that no class covers. Default: it may not."""
        return False

    def refusal(self) -> str | None:
        """Why hooks cannot differentiate this module, although its type is covered. Default: None, they can."""
        return None

    def inputs_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """What :meth:`gradient` gets as ``call.inputs``. Default: the first argument.

        Args:
            args: the positional arguments of the module's forward.
            kwargs: its keyword arguments.
        """
        inputs: Tensor = (*args, *kwargs.values())[0]
        return inputs

    def input_gradient(self) -> Callable[[Tensor], Tensor] | None:
        """A function from the output's gradient to the input's, where it is faster than autograd. Default: None.

        It is made in the forward pass, since sharded models have their weights only then.
        """
        return None

    def has_rows(self, parameter: str) -> bool:
        """Whether :meth:`gradient_rows` is defined for a parameter. Default: it is not."""
        return False

    def gradient_rows(self, parameter: str, call: LayerCall, rows: range) -> Tensor:
        """Some rows of G for each example, without the other rows. It is called only if :meth:`has_rows` is true.

        Args:
            parameter: one of ``parameter_names``.
            call: the layer's input and its output's gradient.
            rows: the range of rows.

        Returns:
            Shape ``(size, len(rows), columns)``, or the same elements in more dimensions.
        """
        raise NotImplementedError(f"{type(self).__name__} must define gradient_rows(), since its has_rows() is true")

    def nonzero_rows(self, parameter: str, call: LayerCall) -> tuple[Tensor, Tensor] | None:
        """The rows of G that are not zero, if they are few, for each example. Default: None, they are not few.

        Args:
            parameter: one of ``parameter_names``.
            call: the layer's input and its output's gradient.

        Returns:
            The rows, shape ``(size, n, columns)``, and their indices, shape ``(size, n)``. Rows with the same index are
            summed.
        """
        return None

    def projected_gradient(self, parameter: str, call: LayerCall, left: Tensor, right: Tensor) -> Tensor | None:
        """``left.T @ G @ right`` for each example, without G itself. Default: None, G must be formed.

        Args:
            parameter: one of ``parameter_names``.
            call: the layer's input and its output's gradient.
            left: shape ``(rows, l)``.
            right: shape ``(columns, r)``.

        Returns:
            Shape ``(size, l, r)``.
        """
        return None

    def has_factors(self) -> bool:
        """Whether :meth:`factors` is defined for this module. Default: it is not, and EK-FAC leaves the layer out."""
        return False

    def factors(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """The two factors of the weight's gradient, which is a sum of their outer products over positions.

        It is called only if :meth:`has_factors` is true.

        Args:
            call: the layer's input and its output's gradient.

        Returns:
            The output's gradients, shape ``(size, positions, outputs)``, and the inputs, shape
            ``(size, positions, inputs)``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define factors(), since its has_factors() is true")

    def positions(self, call: LayerCall) -> int:
        """How many positions the :meth:`factors` of an example have."""
        weight = self.module.get_parameter("weight")
        outputs = weight.numel() // len(weight) if self.rows_are_inputs else len(weight)
        return call.output_gradient.numel() // (call.size * outputs)

    def matrix_factors(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """The two :meth:`factors`: first that of the rows of the weight's matrix, then that of its columns."""
        outputs, inputs = self.factors(call)
        return (inputs, outputs) if self.rows_are_inputs else (outputs, inputs)

    def ordered_factors(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """The :meth:`matrix_factors`, with columns in the order in which a ``SparseProjection`` numbers them."""
        return self.matrix_factors(call)


def layer_of(module: nn.Module) -> Layer | None:
    """The layer of a module: by the class that covers its type, or else recognizes it; None if no class does."""
    kind = own_type(module)
    by_name = f"{kind.__module__}.{kind.__qualname__}"
    covering = Layer._by_type.get(kind) or Layer._by_type.get(by_name)
    if covering is None:
        covering = next((layer for layer in Layer._by_structure if layer.recognizes(module)), None)
    return None if covering is None else covering(module)
