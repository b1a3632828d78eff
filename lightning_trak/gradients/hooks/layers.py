"""What hooks need to know of a type of layer: its parameters' gradients from its input and its output's gradient."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from torch import nn

from lightning_trak.running.fsdp import own_type


class Layer(ABC):  # noqa: B024  # what a subclass defines has the names of the parameters
    """Per-example gradients of one family of modules; a subclass is registered for the types it ``covers``.

    A subclass has one static method for each parameter, under the parameter's name, with the arguments
    ``(module, activation, gradient, size)``: the module, its first input, the gradient of the summed outputs with
    respect to the module's output, and the number of examples. It returns shape ``(size, ...)``, numel elements a row.
    The first dimension of input and gradient is ``size``, or a multiple of it where the model folded another dimension
    into the batch, the example being the slower index: ``reshape(size, -1, ...)`` takes them apart.

    Where the gradient is a sum of outer products, a subclass may have a second method ``project_<parameter>``, with
    the arguments ``(module, activation, gradient, size, left, right)``. It returns left^T G right for each example,
    shape ``(size, l, r)``, without forming G: the gradient as a matrix of as many rows as the parameter's first
    dimension, with the factors ``left`` and ``right`` of shapes ``(rows, l)`` and ``(columns, r)``; or None for a
    module where that is no use.

    Where some rows of that matrix can be had without the others, a method ``rows_of_<parameter>``, with the arguments
    ``(module, activation, gradient, size, start, stop)``, returns those from ``start`` to ``stop``, shape
    ``(size, stop - start, columns)``. Where only a few rows are not zero, ``sparse_<parameter>``, with the arguments
    ``(module, activation, gradient, size)``, returns them, ``(size, n, columns)``, and after them their numbers,
    ``(size, n)``, in which rows that occur several times are to be added.

    Where the weight's gradient is a sum of outer products, a method ``sides(module, activation, gradient, size)`` may
    give those products' factors, of shapes ``(size, positions, rows)`` and ``(size, positions, columns)``, for modules
    that are ``factored``. One side is made of the inputs, and ``rows_are_inputs`` says which; the other is the output's
    gradient, as for the bias.

    Types are matched exactly: a subclass may compute anything in its own ``forward``. One that does not is covered by
    naming it.

    Example:
        >>> import torch
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.ones(()))
        ...
        ...     def forward(self, x):
        ...         return self.weight * x
        >>> class ScaleLayer(Layer, covers=[Scale]):
        ...     @staticmethod
        ...     def weight(module, activation, gradient, size):
        ...         return (activation * gradient).reshape(size, -1).sum(1, keepdim=True)
    """

    rows_are_inputs: ClassVar[bool] = False
    _registry: ClassVar[dict[type[nn.Module] | str, type[Layer]]] = {}
    _by_structure: ClassVar[list[type[Layer]]] = []

    def __init_subclass__(
        cls, covers: list[type[nn.Module] | str] | None = None, covers_by_structure: bool = False
    ) -> None:
        """Register the subclass for modules of these types, or of types given as ``"package.module.Type"``.

        Args:
            covers: the types.
            covers_by_structure: register it for all modules that it :meth:`recognizes` and no type is named for.
        """
        for kind in covers or ():
            Layer._registry[kind] = cls
        if covers_by_structure:
            Layer._by_structure.append(cls)

    @classmethod
    def recognizes(cls, module: nn.Module) -> bool:
        """Whether a module of a type that is not named may be of this kind; what it computes is checked later."""
        del module
        return False

    @staticmethod
    def factored(module: nn.Module) -> bool:
        """Whether ``sides`` gives the gradient of this module's weight."""
        del module
        return False

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Why this module, though of a covered type, cannot be differentiated by hooks; None if it can."""
        del module
        return None


def layer_of(module: nn.Module) -> type[Layer] | None:
    """The layer class that covers a module's type, or else what it computes, if any."""
    kind = own_type(module)
    named = Layer._registry.get(kind) or Layer._registry.get(f"{kind.__module__}.{kind.__qualname__}")
    return named or next((layer for layer in Layer._by_structure if layer.recognizes(module)), None)
