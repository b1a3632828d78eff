"""Keeps snapshots of the weights during ``trainer.fit``."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_trak.callbacks.runs import RunCallback
from lightning_trak.callbacks.saving import SnapshotWriter, Training, gather_state_dict, intervals
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.packages import is_a
from lightning_trak.texts.display import Displayed


class TRAKCallback(Displayed, RunCallback):
    """Saves snapshots of the whole state dict for attribution.

    At most one trigger may be given. The default is ``every_n_epochs=1``. A step is never saved twice. Nothing is saved
    during sanity checking, with ``fast_dev_run``, or in a run without optimizer steps.

    **Which weights.** The weights as the optimizer updates them, and buffers such as BatchNorm statistics, at the end
    of a training batch or epoch. Callbacks that average weights (``WeightAveraging``, ``EMAWeightAveraging``) replace
    the weights by the average when training ends. List this callback before them, or ``save_last`` may save the
    average. Sharded weights (FSDP) are gathered on the CPU of rank zero, which writes them.

    The extra state of modules (``get_extra_state()``) is left out, with a warning. The model that is given for
    attribution keeps its own. Sparse and quantized buffers in the state dict are refused before training begins.
    Buffers with ``persistent=False`` are not in the state dict.

    **What else.** The manifest records the optimizer steps taken and the epochs completed. For each parameter group it
    records the names of its parameters, and the learning rate and weight decay of its optimizer's last step. With
    ``preconditioner=True`` a second file holds what Adam or AdamW multiplies each gradient by, made of its second
    moments, for :class:`~lightning_trak.GradientCosine` and others with ``preconditioned=True``. It takes the space of
    the trained weights.

    **Which run.** A directory belongs to one run. It is an error to start another run in it, even if the first has
    saved nothing yet. In that last case, on file systems without locks, it is the first run that ends with an error.
    ``trainer.fit(ckpt_path=...)`` continues the series, and so does a second call of ``fit`` for the same module:
    snapshots of steps later than the resumed one are removed from the manifest. Another module is another run.
    ``validate``, ``test`` and ``predict`` do not change it.

    Args:
        dirpath: directory of the snapshots: a local path, or a URL that fsspec understands.
        every_n_epochs: save at the end of every n-th training epoch.
        every_n_train_steps: save when ``trainer.global_step`` (optimizer steps, over all optimizers) reaches or
            passes a multiple of n.
        train_time_interval: save after an optimizer step if this much time has passed since the last such save. The
            clock of rank zero decides.
        save_last: save when training ends, unless the last step is saved already.
        preconditioner: whether to keep what the optimizer multiplies gradients by. It must be Adam or AdamW of torch.
        overwrite: delete the snapshots of another run when training starts. Other files stay. Only on file systems with
            locks, and not while another run writes there.
        exist_ok: a run that starts from the same weights as an earlier one, such as the same script with the same seed,
            takes its directory: it starts again, and its snapshots replace the earlier ones. Both runs need this
            option. Another run is refused.

    Raises:
        ValueError: if several triggers are given, one is not a positive integer, or the time is negative. In ``setup``:
            if two callbacks of a Trainer have the same directory. When training starts: if the directory holds
            snapshots of another run, another run is writing to it, or a learning rate is not finite. At a snapshot: if
            another run has taken the directory.
        TypeError: when training starts, if the state dict has entries that are not dense tensors; or with
            ``preconditioner=True``, if an optimizer is another one than Adam or AdamW.
        OSError: on all ranks, if a snapshot cannot be written.
        RuntimeError: in ``setup`` with DeepSpeed ZeRO stage 3, because its weights are not in the state dict; or with
            ``preconditioner=True`` and a strategy that shards the optimizer's state.

    Example::

        snapshots = TRAKCallback("run/snapshots", every_n_epochs=5)
        trainer = L.Trainer(max_epochs=20, callbacks=[snapshots])
        trainer.fit(model, train_loader)
    """

    _shown = ("dirpath", "every_n_epochs", "every_n_train_steps", "train_time_interval", "save_last")

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        save_last: bool = True,
        preconditioner: bool = False,
        overwrite: bool = False,
        exist_ok: bool = False,
    ) -> None:
        epochs, steps = intervals(type(self).__name__, every_n_epochs, every_n_train_steps, train_time_interval)
        super().__init__()
        self.dirpath = os.fspath(dirpath)
        self.every_n_epochs, self.every_n_train_steps = epochs, steps
        self.train_time_interval = train_time_interval
        self.save_last = save_last
        self.preconditioner = preconditioner
        self.overwrite = overwrite
        self.exist_ok = exist_ok
        self._writer: SnapshotWriter | None = None  # of the last fit
        self._module: int | None = None  # id() of the module of the last fit, which a Trainer keeps until the next
        self._seen_step = 0
        self._saved_time = 0.0

    @property
    @override
    def state_key(self) -> str:
        """A key by which Lightning tells several of these callbacks in one Trainer apart."""
        settings = {
            "dirpath": self.dirpath,
            "every_n_epochs": self.every_n_epochs,
            "every_n_train_steps": self.every_n_train_steps,
            "train_time_interval": self.train_time_interval,
        }
        return f"{type(self).__qualname__}{settings}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make all ranks use the same directory, and check that no other TRAKCallback of the Trainer uses it."""
        self._close()
        self._resumed_runs = []  # forget earlier calls: predict(ckpt_path=...) loads callback states too
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if getattr(trainer.strategy, "zero_stage_3", False):
            raise RuntimeError(
                "TRAKCallback cannot save weights that DeepSpeed ZeRO stage 3 partitions; use FSDP or ZeRO stage 2"
            )
        if self.preconditioner and is_a(trainer.strategy, FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy):
            raise RuntimeError(
                "TRAKCallback cannot keep the preconditioner of an optimizer whose state is sharded: use DDP or one"
                " device, or leave preconditioner=True out"
            )
        url = SnapshotSeries(trainer.strategy.broadcast(self.dirpath)).url
        others = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]
        if any(SnapshotSeries(o.dirpath).url == url for o in others if isinstance(o, TRAKCallback)):
            raise ValueError(f'two TRAKCallbacks write to "{self.dirpath}"; give each its own directory')

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start or continue the series."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._seen_step = step = trainer.global_step
        runs, before = self._resumed_runs, self._writer
        if not runs and before is not None and self._module == id(pl_module) and before.saved_step <= step:
            runs = [before.run]  # fit again with the same Trainer
        self._writer = SnapshotWriter(
            _training(trainer),
            self.dirpath,
            step,
            runs,
            preconditioner=self.preconditioner,
            overwrite=self.overwrite,
            exist_ok=self.exist_ok,
        )
        self._run, self._module = self._writer.run, id(pl_module)
        self._saved_time = time.monotonic()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the learning rate of this step. A scheduler may change it before the snapshot is taken."""
        if self._writer is not None:
            self._writer.note(_training(trainer), optimizer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if the optimizer has made a step and the step or time trigger is due."""
        before, self._seen_step = self._seen_step, trainer.global_step
        if self._seen_step == before:  # gradients are accumulating
            return
        if self.every_n_train_steps is not None:
            # With several optimizers the step advances by more than one, so it may pass a multiple.
            due = self._seen_step // self.every_n_train_steps > before // self.every_n_train_steps
        elif self.train_time_interval is not None:
            elapsed = time.monotonic() - self._saved_time
            due = trainer.strategy.broadcast(elapsed >= self.train_time_interval.total_seconds())
        else:
            due = False
        if due:
            self._save(trainer, trainer.current_epoch)
            self._saved_time = time.monotonic()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the epoch trigger is due."""
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs is not None and epoch % self.every_n_epochs == 0:
            self._save(trainer, epoch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        if self.save_last:
            self._save(trainer, trainer.current_epoch)

    def _save(self, trainer: Trainer, epoch: int) -> None:
        if self._writer is not None and trainer.global_step:
            self._writer.save(_training(trainer), trainer.global_step, epoch)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the directory, so that another run may write to it."""
        self._close()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the directory, so that another run may write to it."""
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _training(trainer: Trainer) -> Training:
    strategy = trainer.strategy

    def weights() -> dict[str, Any]:
        if is_a(strategy, FSDPStrategy, ModelParallelStrategy) and strategy.model is not None:
            # If configured for sharded checkpoints, lightning_module_state_dict() gives only this rank's part.
            return gather_state_dict(strategy.model)
        return strategy.lightning_module_state_dict()

    module = trainer.lightning_module
    return Training(module, trainer.optimizers, weights, trainer.is_global_zero, strategy.broadcast)
