"""Whether subsets are equal to others: to those that scores were made from, or to those of another metric."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from lightning_trak.checks import require_tensor


def used_subsets(masks: Tensor, used_masks: Tensor) -> list[int]:
    """The subsets that are among those that were used to make scores.

    Scores that were made with a model know how this model came out. So they predict its outputs, and those of other
    models that were trained on the same subset, better than those of a new model.

    Args:
        masks: bool ``(num_subsets, num_train)``.
        used_masks: bool ``(num_used, num_train)``, the subsets of the models that were used.

    Returns:
        The rows of ``masks`` that are rows of ``used_masks``, too, in ascending order.

    Raises:
        ValueError: If a dtype or shape does not fit.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 0, 1]]).bool()
        >>> used_subsets(masks, masks[[2]])
        [2]
    """
    for name, value in (("masks", masks), ("used_masks", used_masks)):
        require_tensor(name, value)
        if value.dtype != torch.bool or value.ndim != 2 or value.shape[1] != masks.shape[-1]:
            raise ValueError(
                f"Expected `{name}` of dtype torch.bool and shape `(num_subsets, num_train)` with the same num_train,"
                f" but got {value.dtype} {tuple(value.shape)}, beside `masks` of shape {tuple(masks.shape)}."
            )
    used = set(map(bytes, _packed(used_masks)))
    return [row for row, packed in enumerate(_packed(masks)) if bytes(packed) in used]


def _packed(masks: Tensor) -> np.ndarray:
    return np.packbits(masks.cpu().numpy(), axis=1)


def _validate_unused(masks: Tensor, used_masks: Tensor | None) -> None:
    used = [] if used_masks is None else used_subsets(masks, used_masks)
    if used:
        named = ", ".join(map(str, used[:10])) + (", ..." if len(used) > 10 else "")
        raise ValueError(
            f"Expected subsets whose models were not used to make the scores, but {len(used)} of {len(masks)} were:"
            f" rows {named} of `masks`. Scores predict models that they were made with better than new ones. Measure"
            " them on other subsets: a fleet's `split` gives checkpoints, and the ground truth of all other subsets."
        )


def _subsets_digest(masks: Tensor) -> Tensor:
    """SHA-256 of the subsets in their order, float64 ``(32,)``: a number for each byte."""
    digest = hashlib.sha256(f"{tuple(masks.shape)}".encode() + _packed(masks).tobytes()).digest()
    return torch.tensor(list(digest), dtype=torch.float64, device=masks.device)


def _same_subsets(digests: Tensor) -> Tensor:
    """The digest that all rows are equal to.

    Raises:
        ValueError: If they differ.
    """
    if bool((digests != digests[0]).any()):
        raise ValueError(
            "Expected targets of metrics with the same `masks`, but theirs differ: their outputs are those of models of"
            " other subsets. Measure them apart."
        )
    return digests[0]
