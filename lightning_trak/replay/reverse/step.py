"""The reverse pass through one optimizer step, for many targets at once.

Training is a function of the weights w of the examples: the loss of a batch is sum_i w_i l_i / (size of the batch), and
w is 1 in the recorded run. Differentiating through the steps, from the last to the first, gives the derivative of an
output of the trained model by each w_i (Ilyas and Engstrom 2025, arXiv 2504.16430).

A step has two parts. The update maps weights, moments and the gradient to the next weights and moments. The gradient is
a function of weights and w. The reverse pass goes through the update first. What it finds for the gradient then goes
through the gradient of each micro-batch, one after the other, so that only one of them needs memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_trak.gradients.batch import ExampleBatch, Layout
from lightning_trak.replay.losses import Losses, losses_of, require_losses, require_step, require_unchanged
from lightning_trak.replay.player import Played, Player, ReplayError
from lightning_trak.replay.recording.records import MicroBatch, StepRecord
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.replay.reverse.linear_layers import LinearCalls, LinearGradient
from lightning_trak.replay.reverse.products import Products
from lightning_trak.replay.reverse.running_statistics import RunningStatistics
from lightning_trak.replay.reverse.update import Block, Cotangents, Update
from lightning_trak.replay.targets import differentiable
from lightning_trak.running.random_states import restore_random_states


@dataclass(frozen=True)
class _Piece:
    """A part of a micro-batch that is differentiated at once."""

    micro: MicroBatch
    batch: Any
    rows: slice
    number: int  # of the micro-batch in its step


@dataclass(frozen=True)
class _Graph:
    """The gradient of a piece, with its graph.

    Attributes:
        gradients: the gradients by the names of parameters, without a graph.
        outputs: the parts of them that autograd has found, with their graph.
        layers: linear layers that make up the rest.
        weights: the weights of the examples.
        before: running statistics before the pass.
        after: running statistics after it.
        losses: the losses of the examples.
    """

    gradients: dict[str, Tensor]
    outputs: dict[str, Tensor]
    layers: list[LinearGradient]
    weights: Tensor
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    losses: Tensor


class Reverse:
    """Differentiates steps.

    Args:
        player: does the steps, and has the module.
        losses: ``(module, batch) -> losses`` of shape ``(batch,)``, the training loss of each example.
        tracked: names of the parameters that the run trained.
        block: how many targets go through a graph at once; None: as many as fit in memory.
        micro_batch: how many examples are differentiated at once; None: those of a batch of training.
        layout: which parts of a batch belong to single examples; needed for ``micro_batch``.
    """

    def __init__(
        self,
        player: Player,
        losses: Losses,
        tracked: Sequence[str],
        block: int | None,
        micro_batch: int | None,
        layout: Layout | None,
    ) -> None:
        self._player, self._losses, self._tracked = player, losses, tracked
        self._micro_batch, self._layout = micro_batch, layout
        self._products = Products(block, player.dtype)
        self._audited: set[Any] = set()  # kinds of graphs whose products were audited
        self._apart: dict[Any, bool] = {}  # whether linear layers are right apart from autograd, for kinds of pieces
        self.statistics = RunningStatistics(player.module)

    def step(
        self, played: Played, after: TrainingState, blocks: list[Block], by_gradient: list[Cotangents] | None = None
    ) -> list[tuple[list[int], Tensor]]:
        """Go back through a step.

        Args:
            played: the step.
            after: the state after it.
            blocks: derivatives of the outputs by the state after the step. They become those by the state before.
                Blocks that are too large are cut.
            by_gradient: gets for each block the derivatives by the gradient of the step, by the names of parameters.

        Returns:
            Derivatives by the weights of examples: their positions, and a tensor ``(num_targets, len(positions))``, for
            each piece of the step's batches.

        Raises:
            ReplayError: if the step differs from the recorded one.
        """
        player = self._player
        player.arrange(played.record)
        played.before.load(player.module, parameters=player.parameters)
        self.track()
        pieces = list(self._pieces(played))
        if sum(block.num_targets for block in blocks) > 1:
            self._try_apart(played, pieces)
        sums, only_graph = self._gradients(played, pieces)
        require_unchanged(player.parameters, played.before.parameters)
        self._require_known_buffers(played, after)
        update = Update.of(player, played.record, played.before, sums)
        results = {key: result for group in update.outputs.values() for key, result in group.items()}
        require_step(played, after, results, player.dtype, player.update.rounding)
        made = list(player.parameters.values()) if only_graph is None else list(self._inputs(only_graph).values())
        blocks[:] = [part for block in blocks for part in block.cut(self._products.size(made, block.num_targets))]
        # A block goes through update and gradient before the next one, while its cotangents are in the cache.
        moved = ((block, update.back(block, self._products)) for block in blocks)
        turns = moved if len(pieces) == 1 and by_gradient is None else list(moved)
        if by_gradient is not None:
            by_gradient += [found for _, found in turns]
        weights = []
        for piece in reversed(pieces):
            graph = only_graph or self._graph(piece, played.record)
            by_weight = torch.cat([self._through_gradient(graph, *turn) for turn in turns])
            if not by_weight.isfinite().all():
                raise ReplayError(
                    f"derivatives are not finite at step {played.record.step}: between this step and the end, training"
                    " amplifies each change so much that it cannot be followed; train with a smaller learning rate, or"
                    " differentiate the last steps alone (last_steps=)"
                )
            weights.append((list(piece.micro.positions[piece.rows]), by_weight))
        return weights

    def _gradients(self, played: Played, pieces: Sequence[_Piece]) -> tuple[dict[str, Tensor], _Graph | None]:
        """The gradient of a step, by parameter, and its graph if a single piece makes it. The losses are checked."""
        sums: dict[str, Tensor] = {}
        means = [0.0] * len(played.batches)
        only = len(pieces) == 1
        graph: _Graph | None = None
        for piece in pieces:
            with self._products.measuring():
                graph = self._graph(piece, played.record, once=only)
            means[piece.number] += float(graph.losses.detach().sum()) / len(piece.micro.positions)
            for name, gradient in graph.gradients.items():
                sums[name] = sums[name] + gradient if name in sums else gradient
        require_losses(played.record, played.losses, means, self._player.dtype)
        return sums, graph if only else None

    def track(self) -> None:
        """Let all parameters that the run trained require gradients: others may depend on those frozen for a while."""
        for name in self._tracked:
            self._player.parameters[name].requires_grad_(True)

    def _pieces(self, played: Played) -> Iterator[_Piece]:
        for number, (micro, batch, loss) in enumerate(
            zip(played.record.micro_batches, played.batches, played.losses, strict=True)
        ):
            if loss is None:
                continue
            total = len(micro.positions)
            size = self._micro_batch or total
            if size < total:
                self._require_separable(micro)
            for start in range(0, total, size):
                yield _Piece(micro, batch, slice(start, min(start + size, total)), number)

    def _require_separable(self, micro: MicroBatch) -> None:
        if micro.random_states:
            raise ValueError(
                "micro_batch_size cuts a batch, but training_step drew random numbers for the whole batch (dropout"
                " does so); leave micro_batch_size out"
            )
        if any(layer.training for layer in self.statistics.layers.values()):
            raise ValueError(
                "micro_batch_size cuts a batch, but batch normalization needs the whole batch; leave micro_batch_size"
                " out"
            )

    def _try_apart(self, played: Played, pieces: Sequence[_Piece]) -> None:
        """Find out for which pieces linear layers can be taken apart from autograd, which pays for many targets.

        They cannot if the losses differentiate the module themselves, or repeat a part of its forward pass. So a
        gradient and a product are compared.
        """
        for piece in pieces:
            kind = _kind(piece, played.record)
            if kind in self._apart:
                continue
            usual = self._trial(played, piece, apart=False)
            try:
                self._apart[kind] = self._products.agree(usual, self._trial(played, piece, apart=True))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self._apart[kind] = False

    def _trial(self, played: Played, piece: _Piece, apart: bool) -> dict[str, Tensor]:
        """The gradient of a piece, and its product with the derivative. The module then is as before the step."""
        graph = self._made(piece, played.record, apart)
        block = Block(1, {}, {})
        along = {name: gradient.unsqueeze(0) for name, gradient in graph.gradients.items()}
        by_weight = self._through_gradient(graph, block, along)
        played.before.load(self._player.module, parameters=self._player.parameters)
        return graph.gradients | block.cotangents | {"weights": by_weight}

    def _graph(self, piece: _Piece, record: StepRecord, once: bool = False) -> _Graph:
        """The gradient of a piece. If its batch is needed again, ``once`` is false: the losses may change a batch."""
        return self._made(piece, record, self._apart.get(_kind(piece, record), False), once)

    def _made(self, piece: _Piece, record: StepRecord, apart: bool, once: bool = False) -> _Graph:
        player, micro, trained = self._player, piece.micro, record.structure.trained
        size = len(micro.positions)
        batch = piece.batch
        if piece.rows != slice(0, size):
            batch = ExampleBatch(batch, size, self._layout).take(piece.rows).content
        if not once:
            batch = copy.deepcopy(batch)
        expected = piece.rows.stop - piece.rows.start
        restore_random_states(micro.random_states, player.device)
        before = self.statistics.leaves()
        calls = LinearCalls({name: player.parameters[name] for name in self._tracked} if apart else {})
        with differentiable(player), self.statistics.tracked(before) as after:
            with calls:
                losses = losses_of(self._losses, player.module, batch, expected)
            weights = torch.ones_like(losses, requires_grad=True)
            total = (weights * losses).sum() / (size * record.settings.accumulate)
            own, layers = calls.differentiate(total, [player.parameters[name] for name in trained])
        outputs = {name: part for name, part in zip(trained, own, strict=True) if part is not None}
        gradients = {name: output.detach() for name, output in outputs.items()}
        for name, part in (found for layer in layers for found in layer.gradients()):
            gradients[name] = gradients[name] + part if name in gradients else part
        gradients = {name: gradients[name] for name in trained if name in gradients}
        return _Graph(gradients, outputs, layers, weights, before, after, losses)

    def _through_gradient(self, graph: _Graph, block: Block, by_gradient: Cotangents) -> Tensor:
        """Go back through the gradient of a piece. Derivatives by the state before are added to the cotangents.

        Returns:
            The derivatives by the weights of the examples, ``(num_targets, batch)``.
        """
        count, cotangents = block.num_targets, block.cotangents
        pairs: list[tuple[Tensor, Tensor | None]] = [
            (output, by_gradient.get(name)) for name, output in graph.outputs.items()
        ]
        pairs += [pair for layer in graph.layers for pair in layer.cotangents(by_gradient, count)]
        pairs += [(tensor, cotangents.pop(f"buffer/{name}", None)) for name, tensor in graph.after.items()]
        inputs = self._inputs(graph)
        leaves = [leaf for layer in graph.layers for leaf in layer.leaves]
        outputs, vectors = zip(*pairs, strict=True) if pairs else ((), ())
        kind = len(graph.weights), tuple(graph.gradients), len(pairs)
        by_weight = graph.weights.new_zeros(count, len(graph.weights))
        wanted = [*inputs.values(), graph.weights, *leaves]
        blocks = self._products.blocks(outputs, wanted, vectors, count, audit=kind not in self._audited)
        for rows, products in blocks:
            parts = iter(products)
            for name, product in zip(inputs, parts, strict=False):  # takes no more of the parts than there are inputs
                if product is not None:
                    _sums(cotangents, name, product[0], count)[rows] += product
            if (weights := next(parts)) is not None:
                by_weight[rows] = weights
            for layer in graph.layers:
                to = {
                    name: _sums(cotangents, f"parameter/{name}", self._player.parameters[name], count)[rows]
                    for name in (layer.weight, layer.bias)
                    if name is not None
                }
                layer.add([next(parts) for _ in layer.leaves], to)
        if count > 1:  # one alone is not audited
            self._audited.add(kind)
        return by_weight

    def _inputs(self, graph: _Graph) -> dict[str, Tensor]:
        """The weights and running statistics that autograd differentiates a graph by, by the names of cotangents."""
        inside = {name for layer in graph.layers for name in (layer.weight, layer.bias)} - graph.outputs.keys()
        parameters = self._player.parameters
        own = {f"parameter/{name}": parameters[name] for name in self._tracked if name not in inside}
        return own | {f"buffer/{name}": tensor for name, tensor in graph.before.items()}

    def _require_known_buffers(self, played: Played, after: TrainingState) -> None:
        """Check that training changed no buffers other than those whose derivatives are known."""
        for name, buffer in after.buffers.items():
            before = played.before.buffers[name]
            if name in self.statistics.names or not buffer.is_floating_point() or torch.equal(before, buffer):
                continue
            raise ReplayError(
                f'step {played.record.step} changes the buffer "{name}", and the derivative of this change is not'
                " known; only running statistics of batch normalization are supported"
            )


def _kind(piece: _Piece, record: StepRecord) -> tuple[Any, ...]:
    """What tells graphs of different operations apart."""
    return piece.rows.stop - piece.rows.start, tuple(record.structure.trained)


def _sums(cotangents: Cotangents, name: str, like: Tensor, count: int) -> Tensor:
    """The cotangents of a tensor, which are added to."""
    if name not in cotangents:
        cotangents[name] = like.new_zeros(count, *like.shape)
    return cotangents[name]
