"""Refuses features that are not finite, and gives the reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.features.rows import Features
from lightning_trak.running.loading import load

if TYPE_CHECKING:
    from lightning_trak.features.model import ModelCopy


class NotFiniteError(ValueError):
    """The feature of an example is not finite.

    Args:
        message: which example it is, and what to do.
        position: position of the example in its dataset.
    """

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position

    def explained(self, model: ModelCopy, loader: DataLoader[Any]) -> ValueError:
        """The same error, with the reason that the model output gives, if there is one.

        Args:
            model: the model copy, at the checkpoint. It is moved to the CPU.
            loader: the loader whose dataset holds the example.
        """
        (batch,) = load(loader, [[self.position]], num_workers=0)
        model.module.cpu().eval()
        try:
            with model.differentiable():
                reason = model.output.explain_nan(model.module, batch)
        except Exception as error:  # an error that the example causes is the best reason
            reason = f"{type(error).__name__}: {error}"
        return self if reason is None else ValueError(f"{self}. Example {self.position}: {reason}")


def require_finite(rows: Features, positions: Tensor, where: str) -> None:
    """Check that features are finite. Pass rows on the CPU: on a device the check would wait for the computation.

    Args:
        rows: features of some examples.
        positions: positions of the examples in the dataset, shape ``(n,)``.
        where: the name of the checkpoint in errors.

    Raises:
        NotFiniteError: if a feature or one of its scalars is not finite. The error names the first such example.
    """
    finite = [column.isfinite().flatten(1).all(1) if column.ndim > 1 else column.isfinite() for column in rows]
    bad = ~torch.stack(finite).all(0)
    if bad.any():
        first = int(bad.nonzero()[0])
        values = ", ".join(f"{name} {float(getattr(rows, name)[first]):g}" for name in Features._fields[1:])
        position = int(positions[first])
        raise NotFiniteError(
            f"the feature of example {position} {where} is not finite ({values}; features are"
            f" {rows.features.dtype}): look for NaN or huge values in this example or the weights, or use a dtype with"
            " a larger range; nothing of its shard was written",
            position,
        )
