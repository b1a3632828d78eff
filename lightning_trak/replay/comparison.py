"""Whether tensors moved as they should have, up to rounding."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_STEP_ERRORS = {torch.float32: 2e-2, torch.float64: 1e-6}
_ROUNDINGS = 8  # of the dtype, relative to the norm of the weights or of a moment


class OtherStep(NamedTuple):
    """A step that is not the expected one.

    Attributes:
        kind: what moved otherwise: ``"weights"``, or the optimizer's name of a moment.
        moved: the norm of the expected step.
        off: the norm of the difference.
    """

    kind: str
    moved: float
    off: float


def other_step(
    before: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    dtype: torch.dtype,
    rounding: float = 0.0,
) -> OtherStep | None:
    """Compare a step with the expected one, by how far it moves all weights, and all moments of each kind.

    Args:
        before: tensors before the step, by the names of ``TrainingState.tensors()``. A moment that is missing is zero.
        found: tensors after it.
        expected: what these should be, and perhaps more.
        dtype: the dtype of the weights.
        rounding: by how much the optimizer rounds its step, relative to the step.

    Returns:
        None if they differ by no more than rounding.
    """
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in found:
        kinds["weights" if name.startswith("parameter/") else name.rpartition("/")[2]].append(name)
    for kind, names in kinds.items():
        new = [found[name].detach() for name in names]
        right = [expected[name].to(found[name].device) for name in names]
        if _equal_up_to_rounding(new, right, dtype):
            continue
        old = [
            before[name].to(own.device) if name in before else torch.zeros_like(own)
            for name, own in zip(names, new, strict=True)
        ]
        if kind == "weights":
            noise = _moments_of_rounding(found, expected, dtype)
            new = [
                torch.where(noise[name], two, one) if name in noise else one
                for name, one, two in zip(names, new, right, strict=True)
            ]
        off, moved = _distance(new, right), _distance(right, old)
        size = _distance(right, [torch.zeros_like(tensor) for tensor in right])
        if is_other_step(off, moved, size, dtype, rounding):
            return OtherStep(kind, moved, off)
    return None


def is_other_step(off: float, moved: float, size: float, dtype: torch.dtype, rounding: float = 0.0) -> bool:
    """Whether a step differs from another one by more than rounding.

    Args:
        off: the norm of the difference.
        moved: the norm of the step.
        size: the norm of what the step changes.
        dtype: the dtype of the weights.
        rounding: by how much the optimizer rounds its step, relative to the step.
    """
    return not off <= (_STEP_ERRORS[dtype] + rounding) * moved + _ROUNDINGS * torch.finfo(dtype).eps * size


def _moments_of_rounding(
    outputs: Mapping[str, Tensor], later: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Where all moments of a weight are zero up to rounding, by the names of parameters.

    The gradient of a bias before batch normalization is an example. Adam divides it by its own size, and so makes a
    whole step of what is rounding. Two ways to add up the same losses then give two steps.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for name in outputs:
        if name.startswith("moment/") and later[name].is_floating_point():
            names[name.rpartition("/")[2]].append(name)
    found: dict[str, Tensor] = {}
    for kind in names.values():
        zeros = {name: torch.zeros_like(later[name]) for name in kind}
        bound = _ROUNDINGS * torch.finfo(dtype).eps * _distance([later[name] for name in kind], list(zeros.values()))
        for name in kind:
            parameter = name.rpartition("/")[0].replace("moment/", "parameter/", 1)
            if parameter in outputs and later[name].shape == outputs[parameter].shape:
                small = later[name].to(outputs[parameter].device).abs() <= bound
                found[parameter] = found.get(parameter, small) & small
    return found


def _equal_up_to_rounding(new: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether tensors are obviously equal, judged in their own precision, which takes a third of the time."""
    if not all(tensor.is_floating_point() for tensor in expected):
        return False
    off = _norm([torch.dist(one, other) for one, other in zip(new, expected, strict=True)])
    size = _norm([torch.linalg.vector_norm(tensor) for tensor in expected])
    # Beyond these bounds, squares could be infinite or zero.
    return 1e-15 < size < 1e15 and off <= _ROUNDINGS * torch.finfo(dtype).eps * size


def _norm(norms: Sequence[Tensor]) -> float:
    """The norm of tensors that have these norms."""
    return float(torch.linalg.vector_norm(torch.stack(list(norms))))


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    squares = (float((one.double() - other.double()).square().sum()) for one, other in zip(first, second, strict=True))
    return math.sqrt(sum(squares))
