"""Numbers of few bits: what must not be computed in them, kept in them, or is beyond the machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_trak.compatibility import apply_to_tensors
from lightning_trak.outputs import ModelOutput

_HALF = (torch.float16, torch.bfloat16)
_LOSS = 2**-8  # of a stored row, relative to its norm: what rounding to bfloat16 may cost


class WorkingPrecision:
    """Has a module compute in the precision of its weights, but in float32 at least.

    Weights and buffers in half precision become float32, in place: what is solved for, or compared before and after a
    small step, would drown in their rounding.

    Args:
        module: a copy of the user's module.
        convert: convert inputs even if the weights were float32 from the start.

    Attributes:
        dtype: float64 if all weights are, else float32.
    """

    def __init__(self, module: nn.Module, *, convert: bool = False) -> None:
        before = _dtypes_of(module)
        apply_to_tensors(module, lambda tensor: tensor.float() if tensor.dtype in _HALF else tensor)
        after = _dtypes_of(module)
        self.dtype = torch.float64 if after == {torch.float64} else torch.float32
        self._converts = after == {self.dtype} and (convert or before != {torch.float32})

    def convert_input(self, batch: Any) -> Any:
        """A batch for these weights: as a Trainer of true half or double precision converts it.

        A batch for weights that were float32 from the start is left as it is.
        """
        if not self._converts:
            return batch
        return apply_to_collection(
            batch, Tensor, lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Tensors that a forward pass makes are of this dtype, if it does not say another."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _dtypes_of(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}


@contextmanager
def explained_bfloat16(module: nn.Module) -> Iterator[None]:
    """Say in words that the processor cannot do what the module does in bfloat16.

    Raises:
        ValueError: if oneDNN, which torch computes with on a CPU, has no code for it.
    """
    try:
        yield
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        raise ValueError(
            f"this CPU cannot run {type(module).__name__} in bfloat16 ({str(error).split('. ')[0]}): use"
            ' Trainer(precision="32-true"), or a machine that can (x86 with AVX-512, or a GPU)'
        ) from error


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


def precision_of(trainer: L.Trainer, output: ModelOutput) -> str:
    """The precision that features are made in: the Trainer's, but for two kinds of mixed precision without effect.

    The gradients of float16 need their loss scaled to be in range, and an output is not a loss whose scale training has
    found. An output with a context compares it with what the model gives, and rounding would tell equals apart.
    """
    precision = str(trainer.precision)
    unmixed = precision == "16-mixed" or (precision == "bf16-mixed" and output.context_size)
    return "32-true" if unmixed else precision


def autocast_of(trainer: L.Trainer, output: ModelOutput) -> torch.dtype | None:
    """What the forward pass is autocast to for :func:`precision_of`, if anything."""
    return torch.bfloat16 if precision_of(trainer, output) == "bf16-mixed" else None
