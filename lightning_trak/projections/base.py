"""What every projection offers: a configuration that binds to one checkpoint's parameters, and the bound projection."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_trak.checks import positive

_FEATURE_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Projection(ABC):
    """Configuration of a map from gradients to features that keeps inner products, exactly or on average.

    A projection of one's own is a frozen dataclass that derives from this class, with a `BoundProjection` beside it.
    """

    @abstractmethod
    def bind(
        self, shapes: Mapping[str, Sequence[int]], seed: int, checkpoint: int, device: torch.device
    ) -> BoundProjection:
        """Fix the projection for one checkpoint.

        The entries that belong to a parameter depend on `seed`, `checkpoint`, its name and the index in it alone, so
        they are the same for every batch size, device, world size and choice of the other parameters.

        Args:
            shapes: Shape of each parameter, by name, in the order of the features.
            seed: Any non-negative integer.
            checkpoint: Index of the checkpoint.
            device: Where gradients and features will be.

        Returns:
            The projection for this checkpoint.

        """

    def _require_positive(self, *names: str) -> None:
        """Check fields that must be positive integers, and keep integers of NumPy, say, as Python's."""
        for name in names:
            object.__setattr__(self, name, positive(name, getattr(self, name)))

    @property
    def sample_size(self) -> int:
        """Number of training examples whose gradients the bound projection is fitted to before use; 0 for none."""
        return 0

    def fingerprint(self) -> dict[str, Any]:
        """Everything about the configuration that changes features, as JSON-able values.

        Fields declared with `compare=False` only trade memory for time, and are left out.
        """
        config = {field.name: getattr(self, field.name) for field in fields(self) if field.compare}
        return {"class": type(self).__qualname__, **config}


class BoundProjection(ABC):
    """A projection P of one checkpoint's parameters: a block of rows P_name for each parameter.

    Args:
        shapes: Shape of each parameter, of n elements, by name.
        dim: Number of features k.

    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], dim: int) -> None:
        if not shapes:
            raise ValueError("Expected at least one parameter to project but got none; check the parameter selection.")
        self.sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        self._row_sizes = {name: math.prod(shape[1:]) for name, shape in shapes.items()}
        self.dim = dim

    def fit(self, gradients: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Learn from training gradients; needed where the configuration's `sample_size` is not 0.

        Args:
            gradients: For each batch, each parameter's flattened gradients, of shape (batch, n).

        Returns:
            What was learned, for `set_fit`.

        """
        del gradients
        return {}

    def set_fit(self, fitted: Mapping[str, Tensor]) -> None:
        """Take over what `fit` returned, here or in another process."""
        if fitted:
            raise ValueError(f"{type(self).__name__} learns nothing from data but was given {', '.join(fitted)}.")

    def add_(self, features: Tensor, name: str, gradients: Tensor, rows: range | None = None) -> None:
        """Add `gradients @ P_name` to `features` in place, or the part of that product that some rows contribute.

        Works under autocast, which it ignores, under `torch.no_grad` and in inference mode.

        Args:
            features: Features so far, float32 or float64 of shape (batch, dim).
            name: Name of the parameter.
            gradients: Its flattened gradient per example, of shape (batch, n).
            rows: What `gradients` holds of the parameter along its first dimension, without gaps; None is all of it.

        Raises:
            ValueError: If the parameter is unknown, or a shape or dtype is not as above.

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
        if gradients.ndim != 2 or gradients.shape[1] != size:
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
            self._add(features, name, gradients, start)

    @abstractmethod
    def _add(self, features: Tensor, name: str, gradients: Tensor, start: int) -> None:
        """Add the product of gradients and the rows of P_name from `start` on to `features` in place, all checked."""
