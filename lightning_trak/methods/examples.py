"""Applies a function of a model and a batch to all examples of a dataset, in order."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trak.gradients.trials import require_repeatable, trying
from lightning_trak.methods.tokens import target_loader
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention
from lightning_trak.outputs.mixin import declared_output
from lightning_trak.running.data.annotated import numbered
from lightning_trak.running.data.loading import LEAVES_OUT, batch_size_of, num_examples
from lightning_trak.running.data.ranges import IndexedBatch, batch_ranges, draw_audited, share_out
from lightning_trak.running.data.sources import Data, datamodule_of, single_loader
from lightning_trak.running.predict import PredictModule
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import require_whole_parameters
from lightning_trak.running.trainers import predict_over

Rows = Callable[[nn.Module, Any], Tensor]

_AUDITED = 2  # examples that are computed alone, too
_ROUNDING = 0.05  # of bfloat16, relative to the norm of a row


def declared_rows(module: nn.Module, otherwise: str) -> Rows:
    """The output that a module declares, as a function of (module, batch).

    Raises:
        TypeError: if the module declares no output.
        ValueError: if the output depends on other training examples.
    """
    output = declared_output(module, otherwise=otherwise)
    if output.context_size:
        raise ValueError(f"{type(output).__name__} depends on other training examples too; {otherwise}")
    return output.output


class Examples:
    """The examples of one dataset.

    Args:
        data: the data that a user passes.
        stage: ``"fit"`` or ``"predict"``: which loader of a data module is used.
        trainer: the Trainer that a data module is attached to.
        datamodule: the data module that gave ``data``, if that is one of its loaders.
        output: of the examples, if they are targets: of single tokens, it makes an example of each token.

    Attributes:
        loader: the loader that gives the dataset, collate function, batch size and workers.
        datamodule: the data module that gave the loader; None if there is none. It may have batch transfer hooks of
            its own.
    """

    def __init__(
        self,
        data: Data | None,
        stage: str,
        trainer: L.Trainer,
        datamodule: L.LightningDataModule | None = None,
        output: ModelOutput | None = None,
    ) -> None:
        self.loader = target_loader(single_loader(data, stage, trainer), output)
        self.datamodule = datamodule_of(data) or datamodule

    def __len__(self) -> int:
        return num_examples(self.loader)

    def with_loader(self, loader: DataLoader[Any]) -> "Examples":
        """What another loader makes of the same data, with the transfer hooks of these."""
        other = copy.copy(self)
        other.loader = loader
        return other

    def numbered(self) -> "Examples":
        """The same examples in batches with their positions, for outputs that are ``numbered``."""
        return self.with_loader(numbered(self.loader))

    def map(
        self,
        trainer: L.Trainer,
        module: nn.Module,
        function: Rows,
        what: str,
        original: nn.Module | None = None,
        positions: range | None = None,
    ) -> Tensor:
        """Compute a row for each example, without gradients, on the Trainer's device. The module is in eval mode.

        The module and the batches have the Trainer's precision, and autocast is off.

        Args:
            trainer: runs the predict loop, and is left as it was.
            module: a copy of the user's module.
            function: ``(module, batch) -> rows`` of shape ``(batch, ...)``.
            what: the name of the rows in errors.
            original: the user's module. If it is given, rows are checked to depend only on ``module`` and the batch.
            positions: of the examples; default: all.

        Returns:
            On every rank a CPU Tensor ``(len(positions), ...)``, in the order of the dataset.

        Raises:
            ValueError: if ``function`` does not give one row per example, a row is not finite, the Trainer's strategy
                splits the model, or rows depend on chance, on the weights of ``original`` or on the rest of the batch.
        """
        require_whole_parameters(trainer)
        found: list[tuple[Tensor, Tensor]] = []
        mapper = _MapModule.of(trainer)(function, what, original, found, module, self.datamodule)
        chosen = range(len(self)) if positions is None else positions
        batches = batch_ranges(chosen, batch_size_of(self.loader), draw_audited(chosen, _AUDITED, what))
        predict_over(trainer, mapper, share_out(self.loader, [batches], trainer))
        parts = [part for parts in Ranks.of(trainer).gather(found) for part in parts]
        found_at = torch.cat([part for part, _ in parts])
        if len(found_at) != len(chosen):
            missing = len(chosen) - len(found_at)
            raise RuntimeError(f"{what} of {missing} examples are missing; look for an error of another rank")
        rows = torch.cat([part for _, part in parts])
        return rows[found_at.argsort()]


class _MapModule(PredictModule):
    def __init__(
        self,
        function: Rows,
        what: str,
        original: nn.Module | None,
        found: list[tuple[Tensor, Tensor]],
        *args: Any,
    ) -> None:
        super().__init__(*args)
        self._function = function
        self._what = what
        self._original = (original,)  # in a tuple, so that it is not registered as a submodule
        self._found = found
        self._alone: dict[int, Tensor] = {}  # rows of audited examples, until the batch that they are part of

    def predict_step(self, batch: IndexedBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Keep the batch's rows. Return its positions, because Lightning warns about None."""
        self.model.eval()
        (original,) = self._original
        # In the precision of the weights and with the same kernels as features.
        with torch.autocast(self.device.type, enabled=False), exact_attention():
            if batch_idx == 0 and original is not None:
                with trying(original, self.model):
                    require_repeatable(lambda: self._function(self.model, copy.deepcopy(batch.batch)), self._what)
            rows = self._function(self.model, batch.batch)
        self._require_rows(rows, batch.positions)
        if batch.alone:
            position = int(batch.positions[0])
            if _close(rows[0], rows[1], rows):
                self._alone[position] = rows[0]
            else:
                warnings.warn(
                    f"{self._what} of example {position} is not the same twice, perhaps because of random augmentation,"
                    " and will differ from run to run: give data without random augmentation",
                    stacklevel=2,
                )
            return batch.positions
        for row, position in zip(rows, batch.positions.tolist(), strict=True):
            if position in self._alone and not _close(row, self._alone.pop(position), rows):
                raise ValueError(
                    f"{self._what} of example {position} in a batch is not that of the example alone. Two causes are"
                    " common: a collate function that changes the order of examples, such as by their length (keep the"
                    " order; of packed sequences, by enforce_sorted=False), and padding that is not masked"
                )
        self._found.append((batch.positions, rows.cpu()))
        return batch.positions

    def _require_rows(self, rows: object, positions: Tensor) -> None:
        """Check that there is one finite row for each example."""
        count = len(positions)
        if not isinstance(rows, Tensor) or rows.ndim == 0 or len(rows) != count:
            received = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            few = f": {LEAVES_OUT}" if isinstance(rows, Tensor) and rows.ndim > 0 and len(rows) < count else ""
            raise ValueError(f"expected {self._what} as a tensor of {count} rows, one per example, got {received}{few}")
        finite = rows.isfinite().flatten(1).all(1) if rows.ndim > 1 else rows.isfinite()
        if not finite.all():
            first = int(positions[int((~finite).nonzero()[0])])
            raise ValueError(
                f"{self._what} of example {first} is not finite: look for NaN in the example or in the weights"
            )


def _close(row: Tensor, other: Tensor, rows: Tensor) -> bool:
    """Whether two of some rows are the same, up to rounding."""
    if row.shape != other.shape:
        return False
    off, size = float((row.double() - other.double()).norm()), float(other.double().norm())
    return off <= _ROUNDING * size + 1e-3 * float(rows.double().abs().amax(0).norm())
