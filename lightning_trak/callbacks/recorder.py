"""Records a training run during ``trainer.fit``, so that each step can be done again."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_trak.callbacks.between_steps import BetweenSteps
from lightning_trak.callbacks.first_step import require_repeatable
from lightning_trak.callbacks.recordable import require_plain, require_real, require_same_batches, require_step_alone
from lightning_trak.callbacks.runs import RunCallback, run_from
from lightning_trak.callbacks.step_options import StepOptions
from lightning_trak.compatibility import change_train_loader, restore_train_loader
from lightning_trak.replay.optimizers.base import optimizer_name
from lightning_trak.replay.player import describe_parameters
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.recording.records import MicroBatch, Settings, StepRecord, Structure
from lightning_trak.replay.recording.spacing import Spacing, check_spacing, keeps_state
from lightning_trak.replay.recording.states import TrainingState, difference, named_parameters
from lightning_trak.replay.recording.writing import RecordingWriter
from lightning_trak.running.data.content import sample_digest
from lightning_trak.running.data.loading import num_examples
from lightning_trak.running.data.positions import PositionLog
from lightning_trak.running.environment import environment_of
from lightning_trak.running.random_states import RandomWatch
from lightning_trak.texts.display import Displayed

# Of weights that went through a checkpoint. With precision="64-true", Lightning loads it into a module in float32.
_ROUNDING = 1e-6


class TrainingRecorder(Displayed, RunCallback):
    """Records what one needs to repeat each optimizer step exactly.

    :func:`~lightning_trak.replay.replay` repeats the run, and :class:`~lightning_trak.methods.Metagradient`
    differentiates it.

    **What.** For each step: the positions in the dataset of each micro-batch's examples, in order, with any sampler,
    shuffling and workers; hyperparameters of each group of the optimizer; states of the random generators that
    ``training_step`` drew from (torch, CUDA, NumPy, Python); gradient accumulation and clipping; which parameters are
    frozen and which modules in eval mode. At some steps, and at the first and the last: all weights, buffers and the
    optimizer's state. For the run: precision, device, versions, and eight examples to recognize the data.

    **Cost.** A step takes about 0.1 ms, 8 bytes an example, and 5 KB for each generator of the CPU that it draws from.
    A full state takes the bytes of weights and optimizer together (3 numbers a weight for Adam), and the time to copy
    it; a thread writes it. A run of T steps has about sqrt(T) of them with ``"sqrt"``, log2(T) with ``"log"``. Up to
    64 MB wait in memory and as many are being written, and all are written before Lightning saves a checkpoint.

    **Which weights.** Those that the optimizer updates. A callback that replaces them by an average when training ends
    (``StochasticWeightAveraging``, ``WeightAveraging``) should be listed after this one; the average is not recorded,
    and a warning says so when training ends.

    **Which runs.** One process and one device; float32 or float64 weights without mixed precision; automatic
    optimization by one optimizer whose step is known (``SGD``, ``Adam``, ``AdamW``, ``Muon``, :class:`SmoothAdamW
    <lightning_trak.replay.SmoothAdamW>` and what :class:`~lightning_trak.replay.OptimizerStep` adds); one DataLoader
    over a map-style dataset whose items are the same each time; a ``training_step`` that needs no Trainer, which a copy
    of the module tries once. Other runs are refused before training. When the first step has ended, a copy of the
    module repeats it, which takes the memory of a second training for this time. If the copy takes another step, as
    where a hook changes gradients, the run is refused; so is one whose weights change between the first two steps or
    between two epochs.

    **Which directory.** A directory belongs to one run, and another run in it is refused.
    ``trainer.fit(ckpt_path=...)`` continues the recording. Nothing is recorded with ``fast_dev_run``.

    Args:
        directory: directory of the recording, on a disk.
        spacing: how many full states are kept: ``"sqrt"`` before the steps 0, 1, 4, 9, 16, ...; ``"log"`` before the
            steps 0, 1, 2, 4, 8, ...; a number n before every n-th step. Results do not depend on it. Fewer states take
            less space, and more time and memory to differentiate the run.
        overwrite: delete the recording of another run when training starts. Other files stay. Only on file systems with
            locks, and not while another run writes there.
        exist_ok: a run that starts from the same weights and optimizer as an earlier one, such as the same script with
            the same seed, takes its directory, and its recording replaces the earlier one. Both runs need this option.
            Another run is refused.

    Raises:
        ValueError: if ``spacing`` is none of these. Before training: if the run is of another kind, if the directory
            holds another run, or if another run is writing to it. During training: if another run takes the directory,
            if the first step cannot be repeated, or if weights or data change between epochs.
        TypeError: before training, if the data have no positions.
        OSError: if the recording cannot be written.

    Example::

        recorder = TrainingRecorder("run/recording")
        trainer = L.Trainer(max_epochs=15, callbacks=[recorder])
        trainer.fit(model, train_loader)
    """

    _shown = ("directory", "spacing")

    def __init__(
        self,
        directory: str | os.PathLike[str],
        spacing: Spacing = "sqrt",
        *,
        overwrite: bool = False,
        exist_ok: bool = False,
    ) -> None:
        super().__init__()
        self.directory = os.fspath(directory)
        self.overwrite = overwrite
        self.exist_ok = exist_ok
        self.spacing = check_spacing(spacing)
        self._writer: RecordingWriter | None = None  # None: nothing is to be recorded
        self._positions = PositionLog()
        self._loader: DataLoader[Any] | None = None
        self._opened = False
        self._start: tuple[dict[str, Any], TrainingState] | None = None  # the run and its first state
        self._last: dict[str, Tensor] = {}  # the weights when training has ended
        self._forget()

    def _forget(self) -> None:
        """Begin a new step."""
        self._micro: list[MicroBatch] = []
        self._drawn: Sequence[int] | None = None  # positions of the batch that is trained on
        self._options: tuple[Structure, Settings] | None = None

    @property
    @override
    def state_key(self) -> str:
        """A key by which Lightning tells several callbacks in one Trainer apart."""
        return f"{type(self).__qualname__}{{'directory': {self.directory!r}}}"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse runs that cannot be repeated, and watch which examples the Trainer's loader draws."""
        self._close(trainer)
        self._resumed_runs = []
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        require_plain(trainer, pl_module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, TrainingRecorder) for callback in callbacks) > 1:
            raise ValueError(
                "the Trainer has several TrainingRecorders; keep one, which records all that the others would"
            )
        self._writer = RecordingWriter(self.directory, self.spacing)
        change_train_loader(trainer, functools.partial(self._watched, trainer))

    def _watched(self, trainer: Trainer, loader: Any) -> Any:
        self._loader = self._positions.watched(loader)
        if self._opened and (num_examples(self._loader), sample_digest(self._loader)) != self._data:
            raise ValueError(
                f"TrainingRecorder cannot record this run: from epoch {trainer.current_epoch} on, the loader has other"
                " data, and all steps are repeated with the same; train with one dataset of all examples, and let a"
                " sampler choose among them"
            )
        return self._loader

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start or continue the recording."""
        if self._writer is not None:
            self._open(self._writer, trainer, pl_module)

    def _open(self, writer: RecordingWriter, trainer: Trainer, pl_module: LightningModule) -> None:
        self._forget()
        run, step, environment = self._about(trainer, pl_module), trainer.global_step, environment_of(trainer)
        (optimizer,) = trainer.optimizers
        self._parameters = named_parameters(pl_module)
        self._watch = RandomWatch(trainer.strategy.root_device)
        self._step_options = StepOptions(trainer, pl_module, self._parameters, optimizer)
        self._step_options.read()  # fail now, not after the first step
        self._between = BetweenSteps()
        state = self._state(trainer, pl_module)
        self._start = run, state.copy()
        if step:
            earlier = [*self._resumed_runs, *([self._run] if self._run else [])]
            self._run = writer.resume(earlier, step, run, environment)
        else:
            start = run_from(step, dict(state.tensors())) if self.exist_ok else None
            self._run = writer.begin(run, environment, start, self.overwrite)
        self._opened = True
        if writer.has_state(step):
            self._require_recorded(state, step)
        writer.add_state(state)

    def _about(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """What the steps of the run depend on.

        Raises:
            ValueError: if its data or weights are of a kind that cannot be recorded.
        """
        loader = trainer.train_dataloader
        if loader is not self._loader or loader is None:
            raise ValueError(
                "Lightning made a new loader for training (overfit_batches does so), so TrainingRecorder does not know"
                " which examples it draws; train without this option"
            )
        require_real(module)
        digest = sample_digest(loader)
        if digest is None:
            raise ValueError(
                "items of the training data are not the same when they are loaded again, perhaps because of random"
                " augmentation, so their steps cannot be repeated; train without random augmentation, or augment in"
                " training_step, whose random numbers are recorded"
            )
        require_same_batches(trainer, module, loader)
        require_step_alone(trainer, module, loader)
        self._data = num_examples(loader), digest
        return {
            "optimizer": optimizer_name(type(trainer.optimizers[0])),
            "precision": str(trainer.precision),
            "num_train": num_examples(loader),
            "data": digest,
            "parameters": describe_parameters(module),
        }

    def _require_recorded(self, state: TrainingState, step: int) -> None:
        found = difference(state, Recording(self.directory).state(step))
        if found.largest > _ROUNDING:
            raise ValueError(
                f"training continues at step {step}, but {found.name} is not as the recording has it: weights or the"
                " optimizer's state have changed in between, perhaps because fit was called again without ckpt_path=,"
                " which starts a new optimizer; continue with trainer.fit(ckpt_path=...)"
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the random states before the step."""
        if self._writer is not None:
            self._between.begin(pl_module)
            self._drawn = self._positions.take()
            self._watch.before()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the hyperparameters, before schedulers change them for the next step."""
        if self._writer is not None:
            self._between.require_unchanged()
            self._options = self._step_options.read()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the batch, and the step if the optimizer has made one."""
        writer = self._writer
        if writer is None:
            return
        if self._drawn is None:  # a batch that is None is not trained on
            self._positions.take()
            return
        self._micro.append(MicroBatch(self._drawn, batch_idx, self._watch.drawn()))
        self._drawn = None
        if self._options is None:  # gradients are accumulating
            return
        step = writer.num_steps
        if step != trainer.global_step - 1:
            raise ValueError(
                f"TrainingRecorder cannot record this run: {step} steps were recorded before this one, but the Trainer"
                f" counts {trainer.global_step} with it; perhaps optimizer_step of {type(pl_module).__name__} takes no"
                " step for some batches: let training_step return None for them, or use accumulate_grad_batches"
            )
        record = StepRecord(step, trainer.current_epoch, *self._options, tuple(self._micro))
        writer.add_step(record)
        self._forget()
        self._between.end(self._parameters, last=trainer.fit_loop.epoch_loop.done)
        if self._start is not None:
            run, before = self._start
            require_repeatable(trainer, pl_module, run, record, before, self._state(trainer, pl_module))
            self._start = None
        if keeps_state(step + 1, self.spacing):
            writer.add_state(self._state(trainer, pl_module))

    def _state(self, trainer: Trainer, module: LightningModule) -> TrainingState:
        return TrainingState.of(module, trainer.optimizers[0], self._parameters)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write what was recorded so far, so that a run that continues from the checkpoint has all of it."""
        if self._writer is not None:
            self._writer.flush()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the rest, and the state at the end."""
        if self._writer is not None:
            state = self._state(trainer, pl_module)
            self._between.begin(pl_module)
            if self._between.changed:
                self._warn_of_other_weights(self._between.changed)
            elif not self._writer.has_state(self._writer.num_steps):
                self._writer.add_state(state)
            self._writer.flush(finished=True)
            self._last = {name: tensor.to("cpu", copy=True) for name, tensor in state.parameters.items()}

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the recording of a run that was killed between its last checkpoint and its end; look at the weights.

        A fit that continues from that checkpoint takes no step, so that it has no start.
        """
        if self._writer is not None and not self._opened and self._resumed_runs and trainer.global_step:
            self._open(self._writer, trainer, pl_module)
            self.on_train_end(trainer, pl_module)
        now = named_parameters(pl_module)
        for name, last in self._last.items():
            if name not in now or not torch.equal(now[name].cpu(), last):
                self._warn_of_other_weights(name)
                break

    def _warn_of_other_weights(self, name: str) -> None:
        """Callbacks may replace the weights when training has ended: by an average, or by those of the best epoch."""
        rank_zero_warn(
            f'parameters such as "{name}" were changed after the last recorded step: perhaps'
            " a callback put an average of the weights in their place, or those of the best epoch. Metagradients of"
            " this recording are about the weights of the last step, not about these"
        )

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what was recorded, and release the directory."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except (OSError, ValueError) as error:
                rank_zero_warn(f"the last steps were not recorded: {error}")
        self._close(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the directory, so that another run may write to it."""
        self._close(trainer)

    def _close(self, trainer: Trainer) -> None:
        restore_train_loader(trainer)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._loader, self._opened, self._start, self._last = None, False, None, {}
