"""The precision in which features are computed, which is the Trainer's, and the dtype in which they are stored."""

import lightning as L
import torch
from torch import Tensor

from lightning_trak.outputs import ModelOutput

_LOSS = 2**-8  # the error that storing may add to a row, relative to its norm: as rounding to bfloat16


def precision_of(trainer: L.Trainer, output: ModelOutput) -> str:
    """The precision in which features are computed: the Trainer's, except in two cases of mixed precision.

    ``"16-mixed"`` has no effect, because float16 gradients need a scaled loss, and no scale is known for an output.
    ``"bf16-mixed"`` has no effect for an output with a context: it compares the context with outputs of the model, and
    rounding would make equal values differ.
    """
    precision = str(trainer.precision)
    unmixed = precision == "16-mixed" or (precision == "bf16-mixed" and output.context_size)
    return "32-true" if unmixed else precision


def autocast_of(trainer: L.Trainer, output: ModelOutput) -> torch.dtype | None:
    """The dtype that forward passes are autocast to, see :func:`precision_of`; None for no autocast."""
    return torch.bfloat16 if precision_of(trainer, output) == "bf16-mixed" else None


def to_store_dtype(features: Tensor, dtype: torch.dtype, positions: Tensor, place: str) -> Tensor:
    """Convert features to the dtype of the store.

    In a dtype of smaller range, small numbers become zero or lose digits, and large numbers become infinite. It is an
    error if this changes a row by more than rounding to bfloat16 may change it.

    Args:
        features: shape ``(n, k)``.
        dtype: dtype of the store.
        positions: positions of the examples in the dataset, shape ``(n,)``.
        place: the name of the checkpoint in errors.

    Raises:
        ValueError: if a row would change by more than that. The error names its example.
    """
    stored = features.to(dtype)
    smallest = torch.finfo(dtype).tiny
    if smallest <= torch.finfo(features.dtype).tiny:
        return stored
    # Divide each row by its largest element, so that squares are in range.
    scale = features.abs().amax(1, keepdim=True).clamp_min(torch.finfo(features.dtype).tiny)
    out_of_range = (features.abs() < smallest) | stored.isinf()
    error = torch.where(out_of_range, (features - stored) / scale, 0.0).norm(dim=1)
    lost = error > _LOSS * (features / scale).norm(dim=1)
    if lost.any():
        row = int(lost.nonzero()[0])
        wider = "torch.bfloat16 or torch.float32" if dtype == torch.float16 else "torch.float64"
        raise ValueError(
            f"the feature of example {int(positions[row])} {place} does not fit into {dtype}: its largest element is"
            f" {float(scale[row]):.3g}, and {dtype} has full precision only from {smallest:.3g} to"
            f" {torch.finfo(dtype).max:.3g}; use dtype={wider}"
        )
    return stored
