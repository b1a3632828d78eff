"""Metagradients for an average order of the examples.

In the recorded run an example counts in the few steps whose batches hold it. How much it counts depends on where they
lie, and the next run has another order. Here each step minimizes

    mean loss of its batch + sum_i v_i s_i l_i

over all examples i of the run, where s_i is the share of example i in the batches of the whole run, and v = 0 in the
recorded run. So an example's weight is spread over all steps, and over the run it adds up to about what the recorded
batches gave it. The derivative of an output of the trained model by v_i is

    sum_k s_i <c_k, gradient of l_i at the weights before step k>

where c_k is the derivative of the output by the gradient of step k, which the reverse pass has.

It would be too much work to differentiate all examples at each step. So the c_k of a window of steps are added up, and
multiplied by the gradients at the weights in its middle. In a smooth run these gradients change little from step to
step. The c_k change much towards the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_trak.replay.losses import Losses, losses_of
from lightning_trak.replay.player import Played, Player, ReplayError
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.replay.reverse.products import Products
from lightning_trak.replay.reverse.step import Reverse
from lightning_trak.replay.reverse.update import Block, Cotangents
from lightning_trak.replay.targets import differentiable
from lightning_trak.running.random_states import restore_random_states

# A window is an epoch long, or shorter, so that a run has at least this many windows.
WINDOWS = 10


class AverageOrder:
    """The reverse pass through steps that use all examples.

    Args:
        reverse: the reverse pass through recorded steps.
        player: does the steps, and has the module.
        losses: ``(module, batch) -> losses`` of shape ``(batch,)``, the training loss of each example.
        first: the first step that is differentiated.
        block: how many targets go through a graph at once; None: as many as fit in memory.
        micro_batch: how many examples are differentiated at once; None: those of a batch of training.
    """

    def __init__(
        self,
        reverse: Reverse,
        player: Player,
        losses: Losses,
        first: int,
        block: int | None,
        micro_batch: int | None,
    ) -> None:
        self._reverse, self._player, self._losses = reverse, player, losses
        self._first, self._total = first, player.recording.num_steps
        uses: Counter[int] = Counter()
        epochs: Counter[int] = Counter()
        size = 0
        for record in map(player.recording.record, range(player.recording.recorded_steps)):
            epochs[record.epoch] += 1
            for micro in record.micro_batches:
                uses.update(micro.positions)
                size = max(size, len(micro.positions))
        self._window = min(max(epochs.values()), -(-self._total // WINDOWS))
        self._shares = {position: count / uses.total() for position, count in uses.items()}
        # In a random order, since some layers normalize over a batch, and a dataset may be sorted.
        order = torch.tensor(sorted(uses))[torch.randperm(len(uses), generator=torch.Generator().manual_seed(0))]
        self._batches = [part.tolist() for part in order.tensor_split(-(-len(order) // (micro_batch or size)))]
        self._products = Products(block, player.dtype)
        self._audited: set[tuple[str, ...]] = set()  # the parameters of graphs whose products were audited
        self._sums: dict[str, Tensor] = {}  # the derivatives by the gradients of a window, by parameter
        self._middle: Played | None = None

    def step(self, played: Played, after: TrainingState, blocks: list[Block]) -> Iterator[tuple[list[int], Tensor]]:
        """Go back through a step, see :meth:`Reverse.step`.

        Yields:
            At the first step of a window, derivatives by the weights of all examples, for all steps of the window.
        """
        by_gradient: list[Cotangents] = []
        self._reverse.step(played, after, blocks, by_gradient)
        taken = sum(loss is not None for loss in played.losses) / played.record.settings.accumulate
        count = sum(block.num_targets for block in blocks)
        done = 0
        for block, found in zip(blocks, by_gradient, strict=True):
            rows = slice(done, done + block.num_targets)
            for name, cotangent in found.items():
                if name not in self._sums:
                    self._sums[name] = cotangent.new_zeros(count, *cotangent.shape[1:])
                self._sums[name][rows].add_(cotangent, alpha=taken)
            done += block.num_targets
        step = played.record.step
        stop = self._total - (self._total - 1 - step) // self._window * self._window
        start = max(self._first, stop - self._window)
        if step == (start + stop) // 2:
            self._middle = played
        if step == start:
            if self._sums and self._middle is not None:  # else training skipped all batches of the window
                yield from self._derivatives(self._middle, count)
            self._sums, self._middle = {}, None

    def _derivatives(self, middle: Played, count: int) -> Iterator[tuple[list[int], Tensor]]:
        player = self._player
        player.arrange(middle.record)
        middle.before.load(player.module)
        self._reverse.track()
        parameters = [player.parameters[name] for name in self._sums]
        drawn = next((micro.random_states for micro in middle.record.micro_batches if micro.random_states), {})
        for positions, batch in zip(self._batches, player.batches_of(self._batches), strict=True):
            restore_random_states(drawn, player.device)
            with self._products.measuring(), differentiable(player):
                losses = losses_of(self._losses, player.module, batch, len(positions))
                weights = torch.ones_like(losses, requires_grad=True)
                shares = losses.new_tensor([self._shares[position] for position in positions])
                total = (weights * shares * losses).sum()
                gradients = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
            pairs = [pair for pair in zip(gradients, self._sums.values(), strict=True) if pair[0] is not None]
            outputs, vectors = zip(*pairs, strict=True) if pairs else ((), ())
            by_weight = losses.detach().new_zeros(count, len(positions))
            kind = tuple(self._sums)
            blocks = self._products.blocks(outputs, [weights], vectors, count, audit=kind not in self._audited)
            for rows, (found,) in blocks:
                if found is not None:
                    by_weight[rows] = found
            self._audited.add(kind)
            if not by_weight.isfinite().all():
                row = int((~by_weight.isfinite()).any(0).nonzero()[0])
                raise ReplayError(
                    f"derivatives for training example {positions[row]} are not finite at the weights before step"
                    f" {middle.record.step}, where its batches may have been skipped; take order='recorded', or"
                    " differentiate the last steps alone (last_steps=)"
                )
            yield positions, by_weight
