"""A check that each row of a layer's output belongs to the example that hooks assume."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients.hooks.capture import CaptureOutputGradient
from lightning_trak.gradients.leaves import graph_nodes

_LEVELS = 32  # of weights. Gradients times the largest one, 2^31, are in the range of float32


def example_weights(size: int, like: Tensor, precision: torch.dtype, number: int) -> Tensor:
    """A weight for each example, shape ``(size,)``. In a large batch a few share one, and other ones each time.

    They are powers of two, by which a backward pass multiplies without rounding. Other weights would round anew, and
    where large numbers cancel, rounding may be as large as what is left.

    Args:
        size: the number of examples.
        like: a tensor of the weights' dtype and device.
        precision: the dtype of the backward pass. In float16, fewer powers of two are in range.
        number: of the check. Each has another order.
    """
    levels = min(_LEVELS, int(math.log2(torch.finfo(precision).max)) // 2)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(number))
    return (2 ** (order % levels)).to(like)


def row_norms(gradient: Tensor) -> Tensor:
    """The sum of each row's absolute values, in at least float32, shape ``(rows,)``. Squares may be out of range."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), ord=1, dim=1, dtype=dtype)
    return norms


def misplaced(norms: Tensor, weighted: Tensor, weights: Tensor) -> float:
    """How much the rows' gradients differ from those of rows that belong to the assumed examples.

    If only one example's output depends on a row, and this output gets a weight, then the row's gradient gets the same
    weight. A row of another example gets another weight, and so does a row that several examples share.

    Args:
        norms: norms of the rows' gradients if every output has weight 1, shape ``(rows,)``.
        weighted: norms of the rows' gradients if the outputs have ``weights``, shape ``(rows,)``.
        weights: weights of the examples, shape ``(size,)``. ``rows`` is a multiple of ``size``, and the rows of an
            example follow each other.

    Returns:
        The largest difference of the norms from those by the weights, divided by these, relative to the largest norm.
        Rows with a norm that is not finite do not count: an example may have no finite gradient, or its weight may take
        it out of range.
    """
    found = weighted / weights.repeat_interleave(len(norms) // len(weights)).to(weighted)
    known = norms.isfinite() & found.isfinite()
    off, norms = (torch.where(known, each, 0) for each in ((found - norms).abs(), norms))
    largest = norms.max()
    return float(off.max() / largest) if largest > 0 else 0.0


# Operations that may pick or order rows by the values of tensors. The user's autograd functions may do the same; those
# of this package do not.
_PICKING = ("Index", "Gather", "Scatter", "Masked", "Sort", "Topk", "Take", "Put", "Unique", "Repeat", "Flip", "Roll")
_OURS = (f"{CaptureOutputGradient.__name__}Backward", "_OwnAndOthersBackward")


def picks_rows(value: Tensor) -> bool:
    """Whether a tensor's graph has an operation that may pick or order rows by values."""
    for node in graph_nodes(value):
        name = node.name().removeprefix("torch::autograd::")
        if name.startswith(_PICKING) or (name.endswith("Backward") and name not in _OURS) or _mixes_rows(node, name):
            return True
    return False


def _mixes_rows(node: Any, name: str) -> bool:
    """Whether a node is a matrix product with a constant on the left, which may be a permutation of rows."""
    first = {"MmBackward0": 0, "BmmBackward0": 0, "AddmmBackward0": 1, "BaddbmmBackward0": 1}.get(name)
    if first is None:
        return False
    (left, _), (right, _) = node.next_functions[first : first + 2]
    return left is None and right is not None
