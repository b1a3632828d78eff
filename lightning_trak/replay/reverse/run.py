"""The derivative of a recorded run: outputs of the trained model by the weights of its training examples."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_trak.compatibility import tree_iter
from lightning_trak.gradients.batch import Layout, find_layout
from lightning_trak.gradients.precision import in_double
from lightning_trak.gradients.second_derivatives import CAUSES, differentiating_twice, has_derivative
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, modules_in_eval, unchanged
from lightning_trak.replay.losses import Losses, losses_of, require_unchanged
from lightning_trak.replay.player import Played, Player, ReplayError
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.replay.reverse.average_order import AverageOrder
from lightning_trak.replay.reverse.schedule import backwards
from lightning_trak.replay.reverse.step import Reverse
from lightning_trak.replay.reverse.update import Block, Cotangents
from lightning_trak.replay.targets import differentiable, output_at, targets_alone
from lightning_trak.running.data.loading import num_examples
from lightning_trak.running.data.ordering import require_order
from lightning_trak.scoring.groups import Collected, RowBlock, Sums, row_blocks

# States and batches of a segment are kept in memory up to this size, and so are the cotangents of one reverse pass.
SEGMENT_BYTES = 1 << 30
COTANGENT_BYTES = 1 << 31

_INSTEAD = (
    "Train with another operation (of nn.EmbeddingBag: nn.Embedding and a sum), or use a method that differentiates"
    " once, such as TRAK"
)
_CHECKED = 4  # examples whose second derivatives are compared with differences of gradients


class Differentiated:
    """A recorded run that can be differentiated.

    Args:
        player: does the steps of the run, which has ended.
        losses: ``(module, batch) -> losses`` of shape ``(batch,)``.
        first: the first step that is differentiated.
        block: how many targets go through a graph at once; None: as many as fit in memory.
        micro_batch: how many examples are differentiated at once; None: those of a batch of training.
        progress_bar: whether to show a progress bar.
        average_order: whether examples count in all steps, see :mod:`lightning_trak.replay.reverse.average_order`.

    Attributes:
        rounds_steps: whether the optimizer's own steps are rounded more than the weights are.

    Raises:
        ReplayError: if autograd does not have the second derivatives of the losses.
    """

    def __init__(
        self,
        player: Player,
        losses: Losses,
        *,
        first: int,
        block: int | None,
        micro_batch: int | None,
        progress_bar: bool,
        average_order: bool = False,
    ) -> None:
        recording = player.recording
        self._player, self._recording, self._first, self._progress_bar = player, recording, first, progress_bar
        structures = {recording.record(step).structure for step in range(first, recording.num_steps)}
        trained = {name for structure in structures for name in structure.trained}
        self._tracked = [name for name in player.parameters if name in trained]
        require_order(player.loader, "the training data")
        self._layout: Layout | None = None
        probe = [[0], [0, 0], [0, 0, 0]] if micro_batch else [[0]]
        one, *several = player.batches_of(probe)
        if micro_batch:
            self._layout = find_layout(*several)
        self._example_bytes = sum(part.nbytes for part in tree_iter(one) if isinstance(part, Tensor))
        self._reverse = Reverse(player, losses, self._tracked, block, micro_batch, self._layout)
        self._average: AverageOrder | None = None
        if average_order:
            self._average = AverageOrder(self._reverse, player, losses, first, block, micro_batch)
        self._last = player.state_before(recording.num_steps)
        self._require_derivative(losses)
        self.rounds_steps = player.update.rounding > 0

    def _require_derivative(self, losses: Losses) -> None:
        """Check that the gradient of the losses has the derivative that autograd gives, on a few examples."""
        player, recording = self._player, self._recording
        record = recording.record(recording.num_steps - 1)
        positions = record.micro_batches[0].positions[:_CHECKED]
        (batch,) = map(in_double, player.batches_of([positions]))

        def loss(module: nn.Module, weights: Tensor) -> Tensor:
            return (weights * losses_of(losses, module, copy.deepcopy(batch), len(positions))).mean()

        player.load(self._last)
        player.arrange(record)
        self._reverse.track()
        parameters = [player.parameters[name] for name in self._tracked]
        with differentiable(player):
            right = has_derivative(player.module, parameters, loss, torch.ones(len(positions), device=player.device))
        if not right:
            raise ReplayError(
                "the gradients of training change with the weights in another way than autograd's second derivatives"
                f" say, so metagradients of this run would be wrong. {CAUSES}. Train without, or use a method that"
                " differentiates once, such as TRAK"
            )

    def scores(
        self,
        output: ModelOutput,
        targets: DataLoader[Any],
        datamodule: L.LightningDataModule | None,
        rows: Sums | None = None,
        columns: Sums | None = None,
    ) -> Tensor:
        """Differentiate the outputs at targets by the weights of all training examples.

        Args:
            output: the output.
            targets: the loader of the targets.
            datamodule: the data module that gave it, if there is one.
            rows: how targets are added up, before the way back; None: each has a row.
            columns: how training examples are added up; None: each has a column.

        Returns:
            On the CPU, ``(num_targets, num_train)``, or fewer rows and columns.

        Raises:
            ReplayError: if a step cannot be repeated, or its loss is not the mean of the examples' losses.
            ValueError: if an output is not a finite number.
        """
        num_targets = num_examples(targets)
        num_rows = num_targets if rows is None else rows.count
        found = Collected(num_rows, self._recording.run["num_train"], columns, self._player.dtype)
        for span, positions, by_weight in self._derivatives(output, targets, datamodule, rows):
            found.add(span, positions, by_weight)
        return found.scores()

    def own_scores(
        self, output: ModelOutput, train: DataLoader[Any], datamodule: L.LightningDataModule | None
    ) -> Tensor:
        """Differentiate the output at each training example by its own weight: the diagonal of :meth:`scores`.

        Args:
            output: the output.
            train: the loader of the training data.
            datamodule: the data module that gave it, if there is one.

        Returns:
            On the CPU, ``(num_train,)``.

        Raises:
            ReplayError: as :meth:`scores`.
            ValueError: as :meth:`scores`.
        """
        scores = torch.zeros(self._recording.run["num_train"], dtype=self._player.dtype)
        for span, positions, by_weight in self._derivatives(output, train, datamodule, None):
            examples = torch.tensor(positions)
            own = ((examples >= span.start) & (examples < span.stop)).nonzero().flatten()
            scores.index_add_(0, examples[own], by_weight.cpu()[examples[own] - span.start, own])
        return scores

    def _derivatives(
        self,
        output: ModelOutput,
        targets: DataLoader[Any],
        datamodule: L.LightningDataModule | None,
        rows: Sums | None,
    ) -> Iterator[tuple[range, list[int], Tensor]]:
        """Yield which rows, positions of training examples in a step, and derivatives ``(len(span), len(positions))``.

        An example that several steps use comes as often.
        """
        player, last = self._player, self._last
        num_targets = num_examples(targets)
        together = max(1, COTANGENT_BYTES // max(1, last.nbytes))
        modules_in_eval(output, player.device)
        for block in row_blocks(rows, num_targets, together):
            player.load(last)
            batches = targets_alone(player, targets, datamodule, block.members)
            cotangents = self._output_gradients(output, block, batches)
            for positions, by_weight in self._back(cotangents, len(block.span), last.nbytes):
                yield block.span, positions, by_weight

    def probabilities(
        self, output: ModelOutput, targets: DataLoader[Any], datamodule: L.LightningDataModule | None
    ) -> Tensor:
        """What the model predicts at the end of training, each target alone: shape ``(num_targets, classes)``.

        Args:
            output: has the probabilities.
            targets: the loader of the targets.
            datamodule: the data module that gave it, if there is one.
        """
        player = self._player
        player.load(self._last)
        player.module.eval()
        found = []
        for batch in targets_alone(player, targets, datamodule):
            with torch.no_grad(), player.computing(), exact_attention(), unchanged(player.module, output):
                found.append(output.probabilities(player.module, batch).cpu())
        return torch.cat(found)

    def _output_gradients(self, output: ModelOutput, block: RowBlock, batches: Iterator[Any]) -> Cotangents:
        """The derivatives of each row's output by weights and running statistics at the end of training."""
        player, reverse = self._player, self._reverse
        player.module.eval()
        reverse.track()
        names = [f"parameter/{name}" for name in self._tracked]
        parameters = [player.parameters[name] for name in self._tracked]
        totals: list[Tensor] = []
        leaves = reverse.statistics.leaves()
        names += [f"buffer/{name}" for name in leaves]
        places = zip(block.members, block.numbers.tolist(), block.weights.tolist(), strict=True)
        for (number, row, weight), batch in zip(places, batches, strict=True):
            with differentiable(player), reverse.statistics.tracked(leaves):
                values = output_at(player.module, output, batch, number)
                found = torch.autograd.grad(values.sum(), [*parameters, *leaves.values()], materialize_grads=True)
            totals = totals or [gradient.new_zeros(len(block.span), *gradient.shape) for gradient in found]
            for total, gradient in zip(totals, found, strict=True):
                total[row].add_(gradient, alpha=weight)
        require_unchanged(player.parameters, self._last.parameters)
        return dict(zip(names, totals, strict=True))

    def _back(self, cotangents: Cotangents, count: int, state_bytes: int) -> Iterator[tuple[list[int], Tensor]]:
        """Go back through the run. Yields positions of examples, and derivatives ``(count, len(positions))``."""
        recording, player = self._recording, self._player
        total = recording.num_steps
        batch_bytes = self._example_bytes * sum(
            len(micro.positions) for micro in recording.record(total - 1).micro_batches
        )
        held = max(2, SEGMENT_BYTES // (state_bytes + batch_bytes))
        plan = list(backwards(self._first, total, recording.state_steps, held))
        player.open(recording.record(action.step) for action in plan if action.kind == "advance")
        kept: dict[int, TrainingState] = {}
        played: dict[int, Played] = {}
        after: TrainingState | None = None
        blocks = [Block(count, cotangents, {})]
        bar = tqdm(total=total - self._first, desc="Metagradient", disable=not self._progress_bar)
        for kind, step, remember in plan:
            if kind == "load":
                player.load(recording.state(step))
                after = None
            elif kind == "keep":
                kept[step] = player.state
            elif kind == "recall":
                player.load(kept.pop(step))
                after = None
            elif kind == "advance":
                made = player.step(recording.record(step), remember)
                if made is not None:
                    played[step] = made
                player.require_close(step + 1)
            else:
                after = player.state if after is None else after
                made = played.pop(step)
                step_back = self._reverse.step if self._average is None else self._average.step
                with differentiating_twice("Metagradient", _INSTEAD):
                    found = step_back(made, after, blocks)
                yield from found
                after = made.before
                bar.update()
        bar.close()
