"""The eigenbases of EK-FAC: eigenvectors of two small matrices for each layer, and the curvature along them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_trak.features.rows import Features
from lightning_trak.gradients import HookEngine
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.layers import LayerCall
from lightning_trak.gradients.hooks.tracked_module import TrackedModule
from lightning_trak.methods.influence.blocks import Block
from lightning_trak.methods.influence.passes import Passes
from lightning_trak.outputs import ModelOutput

SquaredWeights = Callable[[Tensor, Tensor], Tensor]
"""Takes Q and R of examples, and returns what the squared gradient of each counts, such as R."""


class Basis(NamedTuple):
    """Eigenvectors of a layer's covariances.

    Attributes:
        block: the layer.
        outputs: of the output gradients, in columns.
        inputs: of the inputs, in columns.
    """

    block: Block
    outputs: Tensor
    inputs: Tensor

    def rotate(self, parts: dict[str, Tensor]) -> Tensor:
        """Coordinates ``(n, outputs, inputs)`` of rows by parameter, in the basis of the Kronecker products."""
        return self.outputs.T @ self.block.gather(parts) @ self.inputs


def diagonals(
    passes: Passes, bases: Sequence[Basis], counts: Callable[[Features], Tensor], others: Iterable[str] = ()
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The diagonal of the curvature, in float64: one pass over the training data.

    Args:
        passes: the model at a checkpoint, and the training data.
        bases: of layers.
        counts: what the squared gradient of each example counts, ``(n,)``.
        others: names of parameters outside of these layers.

    Returns:
        In each basis, ``(outputs, inputs)``; and of the other parameters by name, ``(numel,)``.
    """
    found = [torch.zeros(len(basis.outputs), len(basis.inputs), device=passes.device).double() for basis in bases]
    rest = {name: torch.zeros(passes.model.sizes[name], device=passes.device).double() for name in others}
    for _, rows in passes.rows(passes.train):
        own, parts = counts(rows), passes.split(rows.features)
        for basis, total in zip(bases, found, strict=True):
            total += (basis.rotate(parts).square_() * own.view(-1, 1, 1)).sum(0)
        for name, total in rest.items():
            total += own.to(rows.features) @ parts[name].flatten(1).square()
    return found, rest


def divided(
    passes: Passes, rows: Tensor, bases: Sequence[Basis], values: Sequence[Tensor], rest: Mapping[str, Tensor]
) -> Tensor:
    """Rows ``(n, p)`` divided by a diagonal, as :func:`diagonals` returns it."""
    solved = torch.empty_like(rows)
    source, target = passes.split(rows), passes.split(solved)
    for basis, own in zip(bases, values, strict=True):
        basis.block.scatter(basis.outputs @ (basis.rotate(source) / own.to(rows)) @ basis.inputs.T, target)
    for name, own in rest.items():
        target[name].flatten(1).copy_(source[name].flatten(1) / own.to(rows))
    return solved


def unseen_uses(passes: Passes, blocks: list[Block]) -> dict[str, str]:
    """The parameters of layers that hooks differentiate wrongly, each with the reason; found on two examples."""
    engine = _engine(passes, blocks, passes.model.output)
    ((batch, size),) = passes.batches(passes.train, [range(min(2, len(passes.train)))])
    with passes.computing():
        return engine.check(ExampleBatch(batch, size, passes.layout))


def fit_bases(
    passes: Passes, blocks: list[Block], squared_weights: SquaredWeights, *, several_calls: bool = False
) -> list[Basis]:
    """The eigenvectors of each layer's covariances: one pass over the training data.

    Args:
        passes: the model at a checkpoint, and the training data.
        blocks: the layers.
        squared_weights: what an example's squared gradient counts.
        several_calls: whether the calls of a layer that is called several times for a batch are added up.

    Raises:
        ValueError: if a layer is called several times for a batch, and ``several_calls`` is off, or an example's
            gradient is not finite.
    """
    empty = passes.split(torch.zeros(1, passes.size, dtype=passes.dtype, device=passes.device))
    shapes = [block.gather(empty)[0].shape for block in blocks]
    covariances = _Covariances(blocks, shapes, passes.device, several_calls)
    engine = _engine(passes, blocks, _Weighted(passes.model.output, squared_weights))
    with passes.computing():
        for batch, size in passes.batches(passes.train):
            covariances.add(engine, ExampleBatch(batch, size, passes.layout))
    if not all(part.isfinite().all() for pair in covariances.pairs for part in pair):
        for _ in passes.rows(passes.train):  # names the example
            pass
        raise ValueError(f"activations or gradients at {passes.where} are too large for their covariances")
    return [
        Basis(block, *(torch.linalg.eigh(part)[1].to(passes.dtype) for part in pair))
        for block, pair in zip(blocks, covariances.pairs, strict=True)
    ]


def _engine(passes: Passes, blocks: list[Block], output: ModelOutput) -> HookEngine:
    own = {name for block in blocks for name in block.names}
    return HookEngine(
        passes.model.module, output, {name: raw for name, raw in passes.model.names.items() if name in own}
    )


class _Weighted(ModelOutput):
    """An output whose gradients are weighted by a constant of each example."""

    def __init__(self, inner: ModelOutput, squared_weights: SquaredWeights) -> None:
        self.inner = inner
        self.squared_weights = squared_weights

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        outputs = self.inner.output(module, batch)
        return outputs * self.squared_weights(*self.inner.derivatives(outputs)).sqrt().to(outputs)

    def loss(self, output: Tensor) -> Tensor:
        return self.inner.loss(output)


class _Covariances:
    """Sums the products of each layer's output gradients, and of its inputs, over batches.

    Attributes:
        pairs: of output gradients and of inputs, float64, for each block.
    """

    def __init__(
        self, blocks: list[Block], shapes: list[torch.Size], device: torch.device, several_calls: bool
    ) -> None:
        self._numbers = {block.tracked.module: number for number, block in enumerate(blocks)}
        self._blocks = blocks
        self._several_calls = several_calls
        self.pairs = [
            [torch.zeros(side, side, dtype=torch.float64, device=device) for side in shape] for shape in shapes
        ]

    def add(self, engine: HookEngine, batch: ExampleBatch) -> None:
        """Add a batch that the engine differentiates."""
        seen: set[nn.Module] = set()

        def receive(tracked: TrackedModule, call: LayerCall) -> None:
            if tracked.module in seen and not self._several_calls:
                raise ValueError(
                    f"{tracked.path} is called more than once for a batch, and EK-FAC takes each call's gradient for"
                    " the whole: leave its parameters out by parameters="
                )
            seen.add(tracked.module)
            number = self._numbers[tracked.module]
            outputs, inputs = self._blocks[number].factors(call)
            # Where the output does not depend on a position, such as padding, its inputs are in no gradient either.
            inputs = inputs * outputs.any(1, keepdim=True)
            for total, factor in zip(self.pairs[number], (outputs, inputs), strict=True):
                total += factor.T @ factor

        engine.backward(batch, receive)
