"""The precision that features are made in, which is the Trainer's, and the precision that they are kept in."""

import lightning as L
import torch
from torch import Tensor

from lightning_trak.outputs import ModelOutput

_LOSS = 2**-8  # of a stored row, relative to its norm: what rounding to bfloat16 may cost


def precision_of(trainer: L.Trainer, output: ModelOutput) -> str:
    """The precision in which features are made: the Trainer's. Two kinds of mixed precision have no effect.

    Gradients in float16 need a scaled loss to be in range, and training has found no scale for an output. An output
    with a context compares it with what the model gives, and rounding would make equal things differ.
    """
    precision = str(trainer.precision)
    unmixed = precision == "16-mixed" or (precision == "bf16-mixed" and output.context_size)
    return "32-true" if unmixed else precision


def autocast_of(trainer: L.Trainer, output: ModelOutput) -> torch.dtype | None:
    """The dtype that forward passes are autocast to for :func:`precision_of`; None if to none."""
    return torch.bfloat16 if precision_of(trainer, output) == "bf16-mixed" else None


def to_store_dtype(features: Tensor, dtype: torch.dtype, positions: Tensor, place: str) -> Tensor:
    """Features in the dtype that a store keeps them in.

    In a dtype of smaller range, small numbers become zero or lose their digits, and large ones become infinite. That is
    an error if it changes a row by more than rounding to bfloat16 may.

    Args:
        features: shape ``(n, k)``.
        dtype: of the store.
        positions: of the examples in the dataset, shape ``(n,)``.
        place: what to call the checkpoint.

    Raises:
        ValueError: if a row is lost, naming its example.
    """
    stored = features.to(dtype)
    smallest = torch.finfo(dtype).tiny
    if smallest <= torch.finfo(features.dtype).tiny:
        return stored
    # Of the largest element of each row, so that squares are in range.
    scale = features.abs().amax(1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)
    out_of_range = (features.abs() < smallest) | stored.isinf()
    error = torch.where(out_of_range, (features - stored) / scale, 0.0).norm(dim=1)
    lost = error > _LOSS * (features / scale).norm(dim=1)
    if lost.any():
        row = int(lost.nonzero()[0])
        wider = "torch.bfloat16 or torch.float32" if dtype == torch.float16 else "torch.float64"
        raise ValueError(
            f"the feature of example {int(positions[row])} {place} does not fit into {dtype}: its largest element is"
            f" {float(scale[row]):.3g}, and {dtype} has full digits from {smallest:.3g} to"
            f" {torch.finfo(dtype).max:.3g}; keep features in another dtype={wider}"
        )
    return stored
