"""Base classes of projections: the configuration, and the projection that is bound to one checkpoint's parameters."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_trak.checks import positive

_FEATURE_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Projection(ABC):
    """Configuration of a map from gradients to features that keeps inner products, exactly or on average.

    To write your own projection, derive a frozen dataclass from this class and a second class from
    :class:`BoundProjection`.
    """

    @abstractmethod
    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundProjection:
        """Fix the projection for one checkpoint.

        The entries for a parameter depend only on ``seed``, ``checkpoint``, the parameter's name and the index in it.
        They are the same for every batch size, device, world size and choice of the other parameters.

        Args:
            shapes: shape of each parameter, by name, in the order of the features.
            seed: any non-negative integer.
            checkpoint: a number of the checkpoint, at least 0. Equal checkpoints have equal numbers.
            device: the device of gradients and features.

        Returns:
            The projection for this checkpoint.
        """

    def _require_positive(self, *names: str) -> None:
        """Check fields that must be positive integers, and convert integers of other types, such as NumPy's, to int."""
        for name in names:
            object.__setattr__(self, name, positive(name, getattr(self, name)))

    @property
    def sample_size(self) -> int:
        """Number of training examples that the bound projection is fitted to before use; 0 if it needs no fit."""
        return 0

    def fingerprint(self) -> dict[str, Any]:
        """All parts of the configuration that change features, as values that JSON can hold.

        Fields declared with ``compare=False`` are left out: they only trade memory for time.
        """
        config = {field.name: getattr(self, field.name) for field in fields(self) if field.compare}
        return {"class": type(self).__qualname__, **config}


class SampleBatch(ABC):
    """A batch of the training examples that a projection is fitted to. It computes only what it is asked for."""

    @abstractmethod
    def gradients(self) -> Iterator[Mapping[str, Tensor]]:
        """The flattened gradients of each parameter, of shape (some, n), for a few examples at a time."""

    @abstractmethod
    def project(self, projection: BoundProjection) -> tuple[Tensor, Tensor, Tensor]:
        """Project the gradients without holding those of all parameters, if the engine can.

        Args:
            projection: a projection that needs no fit, bound to the same parameters.

        Returns:
            The projected gradients, float32 or float64 of shape (batch, dim), and Q = -dl/df and R = d2l/df2 of each
            example, of shape (batch,). All are finite.
        """


class BoundProjection(ABC):
    """A projection P of one checkpoint's parameters, with a block of rows P_name for each parameter.

    Args:
        shapes: shape of each parameter by name. Below, n is the number of elements of a parameter.
        dim: number of features k.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], dim: int) -> None:
        if not shapes:
            raise ValueError("Expected at least one parameter to project but got none; check the parameter selection.")
        self.sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._row_sizes = {name: math.prod(shape[1:]) for name, shape in shapes.items()}
        self.dim = dim

    @property
    def sketch(self) -> BoundProjection:
        """The projection that engines add gradients to, parameter by parameter; :meth:`finish` does the rest.

        It is this projection itself, unless P is a product of two matrices. Then it is the first one, so that a batch
        is multiplied by the second one once, and not for each parameter.
        """
        return self

    def finish(self, sketches: Tensor) -> Tensor:
        """Map features of :attr:`sketch` to features of P, in the same precision.

        Args:
            sketches: features of :attr:`sketch` to which all parameters have been added, of shape (batch, sketch.dim).

        Returns:
            Features of shape (batch, dim).
        """
        return sketches

    def fit(self, batches: Iterable[SampleBatch]) -> dict[str, Tensor]:
        """Learn from training examples. This is needed if the configuration's ``sample_size`` is not 0.

        Args:
            batches: the sample, to be read once.

        Returns:
            The fitted tensors, for :meth:`set_fit`.
        """
        del batches
        return {}

    def set_fit(self, fitted: Mapping[str, Tensor]) -> None:
        """Use the tensors that :meth:`fit` returned, in this process or in another one."""
        if fitted:
            raise ValueError(f"{type(self).__name__} is not fitted to data but got {', '.join(fitted)}.")

    def add_(self, features: Tensor, name: str, gradients: Tensor, rows: range | None = None) -> None:
        """Add ``gradients @ P_name`` to ``features`` in place. With ``rows``, add these rows' part of the product.

        This works under ``torch.no_grad`` and in inference mode. Under autocast, it ignores autocast.

        Args:
            features: features so far, float32 or float64 of shape (batch, dim).
            name: name of the parameter.
            gradients: the parameter's gradient for each example, of shape ``(batch, n)`` or ``(batch, *shape)``.
            rows: the range of the parameter's first dimension that ``gradients`` holds; None: all of it.

        Raises:
            ValueError: if the parameter is unknown, or if a shape or dtype is another one than above.
        """
        size = self.sizes.get(name)
        if size is None:
            raise ValueError(
                f"Unknown parameter {name!r}: this projection was bound to {len(self.sizes)} others, such as "
                f"{next(iter(self.sizes))!r}; bind it to the shapes of every parameter to project."
            )
        start = 0
        if rows is not None:
            start, size = rows.start * self._row_sizes[name], len(rows) * self._row_sizes[name]
        if not gradients.ndim or math.prod(gradients.shape[1:]) != size:
            raise ValueError(
                f"Expected gradients of {name!r} to have shape (batch, {size}) but got {tuple(gradients.shape)}."
            )
        if features.shape != (len(gradients), self.dim):
            raise ValueError(
                f"Expected features of shape {(len(gradients), self.dim)} but got {tuple(features.shape)}."
            )
        if features.dtype not in _FEATURE_DTYPES:
            raise ValueError(
                f"Expected features in float32 or float64, which sums over {size} elements need, but got "
                f"{features.dtype}; convert them after the last parameter."
            )
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            self._add(features, name, self.flattened(name, gradients), start)

    def flattened(self, name: str, gradients: Tensor) -> Tensor:
        """Flatten gradients in the order in which P numbers their elements. Default: the parameter's own order.

        Args:
            name: name of the parameter.
            gradients: whole rows of its gradient for each example, of shape (batch, n) or (batch, rows, ...).

        Returns:
            Shape (batch, n).
        """
        del name
        return gradients.reshape(len(gradients), math.prod(gradients.shape[1:]))

    @abstractmethod
    def _add(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        """Add the product of gradients and the rows of P_name from ``start`` to ``features``; arguments are checked."""
