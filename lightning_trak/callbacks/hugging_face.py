"""Keeps snapshots of the weights while the Trainer of Hugging Face trains. Needs transformers and accelerate."""

from __future__ import annotations

import math
import os
from typing import Any

import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_trak.callbacks.saving import SnapshotWriter, Training, intervals
from lightning_trak.running.fsdp import is_sharded
from lightning_trak.running.ranks import is_one_of_several

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'TRAKTrainerCallback needs {error.name}: pip install "transformers[torch]"', name=error.name
    ) from error


class TRAKTrainerCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # transformers is not typed
    """Saves snapshots of the state dict for attribution: :class:`~lightning_trak.TRAKCallback` for Hugging Face.

    It writes the same directory, which every method takes as ``checkpoints``: weights as the optimizer updates them,
    the optimizer steps taken, the epochs completed, and the learning rate and weight decay of the last step for each
    parameter group. At most one trigger may be given. The default is ``every_n_epochs=1``. A step is never saved twice.

    **Adapters.** With ``trainable_only=True`` a snapshot has the parameters that require gradients, such as those of
    LoRA, and all buffers. The manifest has a checksum of the parameters that are left out. Attribution refuses a model
    in which they are others.

    **Which run.** A directory belongs to one run. Another run that begins in it is refused before it trains.
    ``trainer.train(resume_from_checkpoint=...)`` continues the series of the run that saved the checkpoint; snapshots
    of later steps are removed from the manifest. The Trainer does not tell its callbacks when training fails. The
    directory then stays taken until this object is gone, trains again, or its process ends.

    **The best model.** With ``load_best_model_at_end=True`` the Trainer loads earlier weights before it ends. These are
    not the weights of the last step, so ``save_last`` saves that step before; if early stopping makes that impossible,
    it warns.

    Args:
        dirpath: directory of the snapshots: a local path, or a URL that fsspec understands.
        every_n_epochs: save at the end of every n-th training epoch.
        every_n_train_steps: save when ``state.global_step`` (optimizer steps) reaches a multiple of n.
        save_last: save when training ends, unless the last step is saved already.
        trainable_only: whether to leave out parameters that are not trained.
        preconditioner: whether to keep what the optimizer multiplies gradients by, made of its second moments. It must
            be Adam or AdamW of torch, as with ``optim="adamw_torch"``. See ``preconditioned`` of
            :class:`~lightning_trak.GradientCosine`.

    Raises:
        ValueError: if several triggers are given, or one is not a positive integer. When training starts: if the
            directory holds snapshots of another run, another run is writing to it, a learning rate is not finite, or
            nothing is trained. At a snapshot: if another run has taken the directory.
        TypeError: when training starts, if the state dict has entries that are not dense tensors; or with
            ``preconditioner=True``, if the optimizer is another one.
        RuntimeError: when training starts, if FSDP, tensor parallelism or DeepSpeed ZeRO stage 3 shard the weights.
        OSError: on all ranks, if a snapshot cannot be written.

    Example::

        callback = TRAKTrainerCallback("run/snapshots", trainable_only=True)
        trainer = transformers.Trainer(
            model, args, train_dataset=train, callbacks=[callback]
        )
        trainer.train()
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        *,
        every_n_epochs: int | None = None,
        every_n_train_steps: int | None = None,
        save_last: bool = True,
        trainable_only: bool = False,
        preconditioner: bool = False,
    ) -> None:
        epochs, steps = intervals(type(self).__name__, every_n_epochs, every_n_train_steps)
        self.dirpath = os.fspath(dirpath)
        self.every_n_epochs, self.every_n_train_steps = epochs, steps
        self.save_last = save_last
        self.trainable_only = trainable_only
        self.preconditioner = preconditioner
        self._writer: SnapshotWriter | None = None  # of the last training
        self._run: str | None = None

    @override
    def state(self) -> dict[str, Any]:
        """What checkpoints of the Trainer keep: the arguments, and the run that the snapshots belong to."""
        names = ("every_n_epochs", "every_n_train_steps", "save_last", "trainable_only", "preconditioner")
        return {
            "args": {"dirpath": self.dirpath} | {name: getattr(self, name) for name in names},
            "attributes": {"_run": self._run},
        }

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the series, or continue it if the Trainer resumes from a checkpoint."""
        self._close()
        model = kwargs["model"]
        _require_whole(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("no parameter of the model requires gradients, so there is nothing to take snapshots of")
        self._writer = SnapshotWriter(
            self._training(state, **kwargs),
            self.dirpath,
            state.global_step,
            _runs(state.stateful_callbacks, type(self).__name__) if state.global_step else [],
            preconditioner=self.preconditioner,
            trainable_only=self.trainable_only,
        )
        self._run = self._writer.run

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the learning rates of this step. The scheduler changes them before the snapshot is taken."""
        if self._writer is not None:
            training = self._training(state, **kwargs)
            self._writer.note(training, training.optimizers[0])

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save if the step trigger is due, or this was the last step."""
        due = self.every_n_train_steps is not None and state.global_step % self.every_n_train_steps == 0
        last = control.should_training_stop or state.global_step >= state.max_steps
        if due or (self.save_last and last):
            self._save(state, **kwargs)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save if the epoch trigger is due, or training has been stopped."""
        epoch = _completed(state)
        whole = math.isclose(state.epoch, epoch, abs_tol=1e-6)  # else training ended within the epoch
        due = self.every_n_epochs is not None and whole and epoch % self.every_n_epochs == 0
        if due or (self.save_last and control.should_training_stop):
            self._save(state, **kwargs)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the last step, and release the directory."""
        if self.save_last and self._writer is not None and state.global_step > self._writer.saved_step:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                rank_zero_warn(
                    f"the snapshot of the last step, {state.global_step}, was not saved: the Trainer has already"
                    f" loaded the best weights, from {state.best_model_checkpoint}; save every n steps or epochs"
                )
            else:
                self._save(state, **kwargs)
        self._close()

    def _save(self, state: TrainerState, **kwargs: Any) -> None:
        if self._writer is not None and state.global_step:
            self._writer.save(self._training(state, **kwargs), state.global_step, _completed(state))

    def _training(self, state: TrainerState, model: nn.Module, optimizer: Optimizer, **_: Any) -> Training:
        def weights() -> dict[str, Any]:
            whole: dict[str, Any] = model.state_dict()
            if not self.trainable_only:
                return whole
            parameters = model.named_parameters(remove_duplicate=False)
            frozen = {name for name, parameter in parameters if not parameter.requires_grad}
            return {name: tensor for name, tensor in whole.items() if name not in frozen}

        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        return Training(model, [inner], weights, state.is_world_process_zero, _broadcast)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _runs(states: dict[str, Any], name: str) -> list[str]:
    """The runs in a checkpoint's callback states. Several callbacks of a class are a list."""
    found = states.get(name, [])
    runs = [one["attributes"].get("_run") for one in (found if isinstance(found, list) else [found])]
    return [run for run in runs if run is not None]


def _completed(state: TrainerState) -> int:
    """The epochs completed. ``state.epoch`` is a sum of fractions."""
    return int(state.epoch + 1e-6)


def _require_whole(model: nn.Module) -> None:
    """Check that each process has the whole model.

    Raises:
        RuntimeError: if it has not.
    """
    wrapped = any(isinstance(part, FullyShardedDataParallel) for part in model.modules())
    named = model.named_parameters()
    parts = [name for name, parameter in named if is_sharded(parameter) or hasattr(parameter, "ds_id")]
    if wrapped or parts:
        where = f", such as {parts[0]}" if parts else ""
        raise RuntimeError(
            "TRAKTrainerCallback cannot save weights that FSDP, tensor parallelism or DeepSpeed ZeRO stage 3 shard"
            f"{where}: train with DDP or on one device, or let the Trainer save whole checkpoints and pass their files"
            " as checkpoints"
        )


def _broadcast(value: Any) -> Any:
    if not is_one_of_several():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
