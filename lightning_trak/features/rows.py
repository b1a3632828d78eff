"""Features and their scalars. Each example of a shard or a batch has a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Features(NamedTuple):
    """The rows of a shard or of a batch.

    Attributes:
        features: projected gradients phi, shape ``(n, k)``.
        outputs: model outputs f, shape ``(n,)``.
        loss_gradients: Q = -dl/df, shape ``(n,)``.
        curvatures: R = d2l/df2, shape ``(n,)``.
    """

    features: Tensor
    outputs: Tensor
    loss_gradients: Tensor
    curvatures: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        """The rows of all parts, one after another."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


def misfit(tensors: dict[str, Tensor], count: int, dtype: str | None = None, k: int | None = None) -> str | None:
    """Describe what is wrong with the rows of a shard; None if nothing is wrong.

    Args:
        tensors: the columns by name.
        count: expected number of rows.
        dtype: expected dtype of the features, such as ``"float32"``; None for any.
        k: expected number of features per example; None for any.
    """
    if set(tensors) != set(Features._fields):
        return f"it holds {', '.join(sorted(tensors))}, not {', '.join(sorted(Features._fields))}"
    features = tensors["features"]
    if features.ndim != 2 or not features.shape[1]:
        return f"its features have shape {tuple(features.shape)}, not (examples, k)"
    if len(features) != count:
        return f"it holds {len(features)} examples, not {count}"
    found = str(features.dtype).removeprefix("torch.")
    if found != (dtype or found) or not features.is_floating_point():
        return f"its features are {found}, not {dtype or 'floating-point numbers'}"
    if features.shape[1] != (k or features.shape[1]):
        return f"it has {features.shape[1]} features per example, but other shards have {k}"
    for name, column in tensors.items():
        if name != "features" and (column.shape != (count,) or not column.is_floating_point()):
            return f"its {name} are {column.dtype} of shape {tuple(column.shape)}, not numbers of shape ({count},)"
    return None
