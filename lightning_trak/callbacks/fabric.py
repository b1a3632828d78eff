"""Keeps snapshots of the weights in a training loop of Fabric."""

from __future__ import annotations

import os
from types import TracebackType
from typing import TYPE_CHECKING, Any

from lightning.fabric.strategies.deepspeed import DeepSpeedStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from typing_extensions import Self

from lightning_trak.callbacks.saving import SnapshotWriter, Training, gather_state_dict
from lightning_trak.checkpoints.optimizers import require_adam
from lightning_trak.compatibility import original_module, original_optimizer
from lightning_trak.packages import is_a
from lightning_trak.running.fsdp import is_sharded

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class FabricSnapshots:
    """Saves snapshots of the whole state dict for attribution: :class:`~lightning_trak.TRAKCallback` for Fabric.

    Train inside ``with``, and call :meth:`save` where a snapshot is wanted. It writes the same directory, which every
    method takes as ``checkpoints``: weights as the optimizers update them, the optimizer steps taken (over all
    optimizers), the epochs completed, and the learning rate and weight decay of the last step for each parameter group.
    The steps are counted as the optimizers make them.

    Sharded weights (FSDP) are gathered on the CPU of rank zero, which writes them. All ranks must enter ``with`` and
    call :meth:`save`.

    **Which run.** A directory belongs to one run. ``with`` takes it, and refuses one that holds snapshots of another
    run. To continue a run, keep this object in the state that ``fabric.save`` writes and ``fabric.load`` reads before
    ``with``. Snapshots of later steps than those of the state are removed from the manifest.

    Args:
        fabric: the Fabric that trains.
        dirpath: directory of the snapshots: a local path, or a URL that fsspec understands.
        model: the model that ``fabric.setup`` returned.
        optimizers: the optimizers that ``fabric.setup`` returned.
        preconditioner: whether to keep what the optimizers multiply gradients by, made of their second moments. They
            must be Adam or AdamW of torch. See ``preconditioned`` of :class:`~lightning_trak.GradientCosine`.

    Raises:
        TypeError: if there is no optimizer, or a model or optimizer is something else; with ``preconditioner=True``, if
            an optimizer is not Adam or AdamW. In ``with``: if the state dict has entries that are not dense tensors.
        ValueError: if an optimizer has no parameters of the model. In ``with``: if the directory holds snapshots of
            another run, another run is writing to it, or a learning rate is not finite.
        RuntimeError: if DeepSpeed trains the model, or with ``preconditioner=True``, if the weights are sharded.

    Example::

        model, optimizer = fabric.setup(model, optimizer)
        with FabricSnapshots(fabric, "run/snapshots", model, optimizer) as snapshots:
            for epoch in range(20):
                for inputs, labels in loader:
                    optimizer.zero_grad()
                    fabric.backward(F.cross_entropy(model(inputs), labels))
                    optimizer.step()
                snapshots.save(epoch=epoch + 1)
    """

    def __init__(
        self,
        fabric: Fabric,
        dirpath: str | os.PathLike[str],
        model: nn.Module,
        *optimizers: Optimizer,
        preconditioner: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be the module that fabric.setup returned, got {type(model).__name__}")
        self.fabric = fabric
        self.dirpath = os.fspath(dirpath)
        self.preconditioner = preconditioner
        self._wrapped, self._model = model, original_module(model)
        self._optimizers = [original_optimizer(optimizer) for optimizer in optimizers]
        self._require_optimizers()
        if is_a(fabric.strategy, DeepSpeedStrategy):
            raise RuntimeError("FabricSnapshots cannot save weights that DeepSpeed trains; use FSDP, DDP or one device")
        if preconditioner:
            require_adam(self._optimizers)
            if self._sharded() is not None:
                raise RuntimeError(
                    "FabricSnapshots cannot keep the preconditioner of an optimizer whose state is sharded: use DDP or"
                    " one device, or leave preconditioner=True out"
                )
        self._training = Training(self._model, self._optimizers, self._weights, fabric.is_global_zero, fabric.broadcast)
        self._writer: SnapshotWriter | None = None  # None: not inside with
        self._run: str | None = None
        self._step = 0
        self._watches: list[Any] = []

    def _require_optimizers(self) -> None:
        if not self._optimizers:
            raise TypeError("pass the optimizers that fabric.setup returned, whose steps are counted")
        own = {id(parameter) for parameter in self._model.parameters()}
        for number, optimizer in enumerate(self._optimizers):
            if not isinstance(optimizer, Optimizer):
                raise TypeError(
                    f"optimizer {number} must be one that fabric.setup returned, got {type(optimizer).__name__}"
                )
            if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
                raise ValueError(
                    f"optimizer {number} ({type(optimizer).__name__}) has no parameter of the model: pass the model"
                    " and the optimizers of one training, as fabric.setup returned them"
                )

    def state_dict(self) -> dict[str, Any]:
        """The run that the snapshots belong to, and its steps. ``fabric.save`` calls this."""
        return {"run": self._run, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the run of a checkpoint. ``fabric.load`` calls this.

        Raises:
            RuntimeError: inside ``with``, which has taken the directory for a new run.
        """
        if self._writer is not None:
            raise RuntimeError("load the state before with: inside it, FabricSnapshots has begun a new run already")
        self._run, self._step = state["run"], state["step"]

    def __enter__(self) -> Self:
        if self._writer is not None:
            raise RuntimeError("this FabricSnapshots is inside with already; make another one for another training")
        runs = [] if self._run is None else [self._run]
        writer = SnapshotWriter(self._training, self.dirpath, self._step, runs, preconditioner=self.preconditioner)
        self._writer, self._run = writer, writer.run
        self._watches = [optimizer.register_step_post_hook(self._count) for optimizer in self._optimizers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _count(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._step += 1
        if self._writer is not None:
            self._writer.note(self._training, optimizer)

    def save(self, epoch: int = 0) -> None:
        """Save a snapshot. All ranks must call this. A step is never saved twice.

        Args:
            epoch: training epochs completed.

        Raises:
            RuntimeError: outside ``with``.
            ValueError: if ``epoch`` is not a whole number of at least 0, or another run has taken the directory.
            OSError: on all ranks, if the snapshot cannot be written.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"epoch must be the number of completed epochs, 0 or more, got {epoch!r}")
        if self._writer is None:
            raise RuntimeError("call save inside with: with FabricSnapshots(...) as snapshots: ... snapshots.save()")
        self._writer.save(self._training, self._step, epoch)

    def close(self) -> None:
        """Release the directory, so that another run may write to it. ``with`` does this at its end."""
        for watch in self._watches:
            watch.remove()
        self._watches = []
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _sharded(self) -> nn.Module | None:
        """The module whose parameters are sharded; None if each rank has the whole model."""
        if any(is_sharded(parameter) for parameter in self._model.parameters()):
            return self._model
        return next((part for part in self._wrapped.modules() if isinstance(part, FullyShardedDataParallel)), None)

    def _weights(self) -> dict[str, Any]:
        """The whole state dict, at least on rank zero."""
        sharded = self._sharded()
        if sharded is None:
            return self._model.state_dict()
        return gather_state_dict(sharded)
