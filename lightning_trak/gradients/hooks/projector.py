"""Projects a layer's gradients when the backward pass reaches it, and forms only the parts that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from lightning_trak.gradients.hooks.layers import Layer, LayerCall
from lightning_trak.gradients.hooks.parts import examples_at_once
from lightning_trak.gradients.hooks.tracked_module import TrackedModule
from lightning_trak.projections.base import BoundProjection
from lightning_trak.projections.kronecker import BoundKroneckerProjection
from lightning_trak.projections.sparse import BoundSparseProjection

# Bytes of gradients that are formed at a time. On a CPU, they should stay in cache, but be those of several examples,
# which threads share out. Elsewhere, few kernels are better.
_CPU_BYTES = 10 << 20
_ACCELERATOR_BYTES = 1 << 28
# A parameter is small if the gradients of this many like it are formed at a time. Those are added by one operation: in
# models of many small layers, an operation for each would take longer than the additions.
_SMALL = 64
# Rows of a gradient are formed in multiples of this number: products with fewer or other rows are slow.
_CPU_ROWS, _ACCELERATOR_ROWS = 32, 1024
# To draw the target of an element takes about as long as to form and add 50 elements, and it takes about 32 bytes.
_DRAWING, _WORDS_BYTES = 50, 32
# The largest block whose release makes the GNU C library keep freed memory, see mallopt(3), M_MMAP_THRESHOLD.
_KEPT_BYTES = (32 << 20) - (1 << 16)


@cache
def _keep_freed_memory() -> None:
    """Let the allocator keep the memory of gradients for the next ones.

    The GNU C library returns memory to the system if more is free than twice the largest block that was ever released,
    up to 64 MiB. Gradients and the kernels' own buffers exceed what a small batch has released. To get their memory
    from the system for every part takes longer than to form them. The block here is never touched, and costs nothing.
    """
    torch.empty(_KEPT_BYTES, dtype=torch.uint8)


class LayerProjector:
    """Adds the projected gradients of each layer call to the features; what is small waits for :meth:`flush`.

    Args:
        projection: a projection that is bound to the parameters.
        features: features so far, shape ``(size, dim)``, float32 or float64; changed in place.
        parameters: the parameters, by name.
    """

    def __init__(self, projection: BoundProjection, features: Tensor, parameters: Mapping[str, Tensor]) -> None:
        self._projection = projection
        self._features = features
        self._size = len(features)
        self._parameters = parameters
        cpu = features.device.type == "cpu"
        self._bytes = _CPU_BYTES if cpu else _ACCELERATOR_BYTES
        self._rows = _CPU_ROWS if cpu else _ACCELERATOR_ROWS
        self._small: list[tuple[str, Tensor]] = []  # what is not added yet, with the names of the parameters
        self._small_bytes = 0
        if cpu:
            _keep_freed_memory()

    def __call__(self, tracked: TrackedModule, call: LayerCall) -> None:
        """Project the gradients of a layer's parameters.

        Args:
            tracked: the layer's module.
            call: the layer's input and its output's gradient.
        """
        for attribute, name in tracked.parameters.items():
            arguments = tracked.layer, attribute, name, call
            ways = self._add_core, self._add_sparse, self._add_folded, self._keep_small
            if not any(way(*arguments) for way in ways):
                self._add_dense(*arguments)

    def flush(self) -> None:
        """Add what is kept, by one operation. Call it after the backward pass."""
        if self._small:
            assert isinstance(self._projection, (BoundSparseProjection, BoundKroneckerProjection))
            names, parts = zip(*self._small, strict=True)
            self._projection.add_joined_(self._features, names, parts)
            self._small, self._small_bytes = [], 0

    def _add_core(self, layer: Layer, attribute: str, name: str, call: LayerCall) -> bool:
        """Project both sides of a gradient without forming it. Returns False if it must be formed."""
        if not isinstance(self._projection, BoundKroneckerProjection):
            return False
        left, right = (factor.to(call.output_gradient) for factor in self._projection.factors(name))
        cores = layer.projected_gradient(attribute, call, left, right)
        if cores is not None:
            self._keep(name, self._projection.scaled(name, cores))
        return cores is not None

    def _add_sparse(self, layer: Layer, attribute: str, name: str, call: LayerCall) -> bool:
        """Project only the rows that are not zero. Returns False if this would not save much."""
        if not isinstance(self._projection, BoundSparseProjection):
            return False
        nonzero = layer.nonzero_rows(attribute, call)
        if nonzero is None:
            return False
        rows, indices = nonzero
        if _DRAWING * indices.shape[1] > len(self._parameters[name]):
            return False
        step = max(1, self._bytes // (_WORDS_BYTES * rows[0].numel()))
        for start in range(0, self._size, step):
            some = slice(start, start + step)
            self._projection.add_sparse_(self._features[some], name, rows[some], indices[some])
        return True

    def _add_folded(self, layer: Layer, attribute: str, name: str, call: LayerCall) -> bool:
        """Fold a large matrix from its factors. Returns False if it has no fold or no factors."""
        if not isinstance(self._projection, BoundSparseProjection) or attribute != "weight" or not layer.has_factors():
            return False
        fold = self._projection.folds.get(name)
        if fold is None:
            return False
        size = fold.numbers(layer.positions(call)) * call.output_gradient.element_size()
        step = examples_at_once(self._bytes, size)
        for start in range(0, self._size, step):
            features = self._features[start : start + step]
            some = call.take(start, start + len(features))
            self._projection.add_folded_(features, name, fold.of_factors(*layer.ordered_factors(some)))
        return True

    def _keep_small(self, layer: Layer, attribute: str, name: str, call: LayerCall) -> bool:
        """Keep the gradients of a small parameter. Returns False if it is not small."""
        size = self._size * self._parameters[name].numel() * call.output_gradient.element_size()
        if not isinstance(self._projection, BoundSparseProjection) or name in self._projection.folds:
            return False
        if _SMALL * size > self._bytes:
            return False
        self._keep(name, self._projection.flattened(name, layer.gradient(attribute, call)))
        return True

    def _keep(self, name: str, part: Tensor) -> None:
        """Keep what a parameter adds to the features for :meth:`flush`."""
        if self._small_bytes + part.nbytes > self._bytes:
            self.flush()
        self._small.append((name, part))
        self._small_bytes += part.nbytes

    def _add_dense(self, layer: Layer, attribute: str, name: str, call: LayerCall) -> None:
        """Form and project the gradients in parts: a few examples at a time.

        If the layer can form single rows of a gradient, a part has fewer rows and more examples. The projection then
        generates its entries for these rows once for all these examples.
        """
        parameter = self._parameters[name]
        length = parameter.shape[0] if parameter.ndim else 1
        row_bytes = parameter.numel() // length * call.output_gradient.element_size()
        least = min(length, self._rows) if layer.has_rows(attribute) else length
        step = min(self._size, examples_at_once(self._bytes, least * row_bytes))
        height = min(length, least * max(1, self._bytes // (least * step * row_bytes)))
        for start in range(0, self._size, step):
            features = self._features[start : start + step]
            count = len(features)
            some = call.take(start, start + count)
            if height == length:
                self._projection.add_(features, name, layer.gradient(attribute, some))
                continue
            some = some.contiguous()
            for top in range(0, length, height):
                rows = range(top, min(top + height, length))
                part = layer.gradient_rows(attribute, some, rows)
                self._projection.add_(features, name, part, rows)
                del part  # so that the next part takes the same memory, which is in cache
