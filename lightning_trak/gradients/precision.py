"""The precision that a module computes in: float32 or more where rounding matters, and errors of CPUs in bfloat16."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_trak.compatibility import apply_to_tensors
from lightning_trak.outputs.base import ModelOutput

_HALF = (torch.float16, torch.bfloat16)
_CONVERTS = {torch.float16: "16-true", torch.bfloat16: "bf16-true", torch.float64: "64-true"}  # precisions of Trainers


class WorkingPrecision:
    """Lets a module compute in the precision of its weights, but in float32 at least.

    Weights and buffers in half precision become float32, in place. The rounding of half precision would be larger than
    the effect of a small step, and too large for solvers.

    Args:
        module: a copy of the user's module.
        convert: whether to convert inputs even if the weights were float32 from the start.

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
        """Convert a batch to the dtype of the weights, as a Trainer with true half or double precision does.

        If the weights were float32 from the start, the batch is not changed.
        """
        return _converted(batch, self.dtype) if self._converts else batch

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside this context, ``dtype`` is torch's default dtype for new tensors."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def in_double(content: Any) -> Any:
    """A batch, or any structure of tensors, with floating-point numbers in float64."""
    return _converted(content, torch.float64)


def _converted(content: Any, dtype: torch.dtype) -> Any:
    return apply_to_collection(
        content, Tensor, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    )


def output_in_double(output: ModelOutput) -> ModelOutput:
    """A copy of an output, with its modules and tensors in float64."""
    copied = copy.deepcopy(output)
    for attribute, value in vars(copied).items():
        setattr(copied, attribute, value.double() if isinstance(value, nn.Module) else in_double(value))
    return copied


def _dtypes_of(module: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()}


@contextmanager
def explained_precision(module: nn.Module) -> Iterator[None]:
    """Raise a clear error if a module cannot run in the precision of its weights.

    Raises:
        ValueError: if weights and data are of different dtypes, or if oneDNN, which torch uses on a CPU, has no code
            for an operation in bfloat16.
    """
    try:
        yield
    except RuntimeError as error:
        what, name = str(error).split(". ")[0], type(module).__name__
        if "could not create a primitive" in what:
            raise ValueError(
                f'this CPU cannot run {name} in bfloat16 ({what}): use Trainer(precision="32-true"), or a machine that'
                " can (x86 with AVX-512, or a GPU)"
            ) from error
        if not re.search("dtype|scalar type|Input type", what) or re.search("Long|Int|Bool|Byte|long|int", what):
            raise
        dtypes = {str(dtype).removeprefix("torch."): _CONVERTS.get(dtype) for dtype in _dtypes_of(module)}
        needed = sorted(filter(None, dtypes.values()))
        advice = "convert the data to float32"
        if needed:
            advice = f"use Trainer(precision={needed[0]!r}), which converts the data, or convert the model by float()"
        raise ValueError(
            f"{name} has weights in {' and '.join(sorted(dtypes))}, and they met numbers of another dtype ({what}):"
            f" {advice}"
        ) from error
