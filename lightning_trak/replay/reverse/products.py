"""Products of cotangents with a Jacobian, for many cotangents at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Intermediate results of as many cotangents as fit in this size are computed at once.
BLOCK_BYTES = 1 << 29

# On a CPU, also the results. The C library takes larger tensors from the system each time, and the system clears them,
# which takes longer than to compute them. With twice this size, it did so in some processes and not in others.
RESULT_BYTES = 1 << 23


class Products:
    """Multiplies cotangents by the derivative of outputs by inputs, in blocks.

    Some operations of torch have a wrong derivative, or none, for many cotangents at once (``F.group_norm`` in torch
    2.13). So where it is asked for, one product is also computed alone. If they differ, all are computed one after the
    other.

    Args:
        block: how many cotangents go through a graph at once; None: it follows from the first graph, see
            :meth:`measuring`.
        dtype: the dtype of the graphs.

    Attributes:
        batched: whether several cotangents go through a graph at once.
    """

    def __init__(self, block: int | None, dtype: torch.dtype) -> None:
        self._block = block
        self._fitting, self._measured = 1, False
        self._rounding = {torch.float64: 1e-9}.get(dtype, 1e-3)
        self.batched = True

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Make a graph, and let the size of blocks follow from the first one."""
        if self._block is not None or self._measured:
            yield
            return
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor.detach()  # the tensor itself would keep its own graph alive

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self._fitting, self._measured = BLOCK_BYTES // max(1, sum(sizes.values())), True

    def blocks(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        count: int,
        audit: bool = False,
    ) -> Iterator[tuple[slice, list[Tensor | None]]]:
        """Multiply cotangents of the outputs by the derivative of the outputs by the inputs.

        Args:
            outputs: tensors with their graphs.
            inputs: leaves of these graphs.
            cotangents: for each output ``(count, *shape)``; None for zeros. Rows that were yielded may be changed.
            count: the number of cotangents.
            audit: whether to compare one product with that of its cotangent alone.

        Yields:
            For each block its rows, and for each input ``(rows, *shape)``; None if nothing depends on it. The graphs
            are kept. Where the derivative is the identity, the product may be a view of the cotangents.
        """
        pairs = [
            (output, along)
            for output, along in zip(outputs, cotangents, strict=True)
            if along is not None and output.requires_grad
        ]
        if not pairs:
            return
        live, vectors = zip(*pairs, strict=True)
        size = self.size(inputs, count)
        if audit and self.batched and size > 1:
            self._audit(live, inputs, [vector[:size] for vector in vectors])
        size = size if self.batched else 1
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            taken = [vector[rows] for vector in vectors]
            yield rows, list(_product(live, inputs, taken))

    def size(self, inputs: Sequence[Tensor], count: int) -> int:
        """How many of some cotangents go through a graph at once.

        Args:
            inputs: what the products are the derivatives by.
            count: the number of cotangents.
        """
        if self._block is not None:
            return min(count, self._block)
        size = min(count, self._fitting)
        if all(part.device.type == "cpu" for part in inputs):
            size = min(size, RESULT_BYTES // max(1, sum(part.nbytes for part in inputs)))
        return max(1, size)

    def _audit(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> None:
        """Compare the last product of a block with that of its cotangent alone."""
        alone = _product(outputs, inputs, [vector[-1:] for vector in vectors])
        try:
            together = _product(outputs, inputs, vectors)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # an operation without a rule for many cotangents
            self.batched = False
            return
        last = [None if many is None else many[-1:] for many in together]
        self.batched = self.agree(dict(enumerate(alone)), dict(enumerate(last)))

    def agree(self, some: Mapping[Any, Tensor | None], others: Mapping[Any, Tensor | None]) -> bool:
        """Whether tensors are the same up to the rounding of products. Those that are missing are zero."""
        for key in some.keys() | others.keys():
            one, other = some.get(key), others.get(key)
            like = other if one is None else one
            if like is None:
                continue
            one, other = (torch.zeros_like(like) if part is None else part for part in (one, other))
            off, size = float((one - other).norm()), float(one.norm())
            if not off <= self._rounding * size + torch.finfo(like.dtype).tiny:
                return False
        return True


def _product(outputs: Sequence[Tensor], inputs: Sequence[Tensor], along: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if len(along[0]) > 1:
        return torch.autograd.grad(outputs, inputs, along, retain_graph=True, allow_unused=True, is_grads_batched=True)
    alone = torch.autograd.grad(outputs, inputs, [part[0] for part in along], retain_graph=True, allow_unused=True)
    return tuple(None if part is None else part.unsqueeze(0) for part in alone)
