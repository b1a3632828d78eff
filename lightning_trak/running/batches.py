"""The one loop that moves batches to the device. It calls the same hooks as Lightning, in the same order."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.hooks import DataHooks
from torch import Tensor, nn

from lightning_trak.packages import is_a, overrides
from lightning_trak.running.data.annotated import AnnotatedBatch
from lightning_trak.running.data.ranges import IndexedBatch
from lightning_trak.running.data.singles import Singles

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class TransferHooks:
    """The batch transfer hooks that Lightning would call: the data module's if it overrides them, else the module's.

    They get the user's own batch, also of an :class:`~lightning_trak.running.data.ranges.IndexedBatch`, of an
    :class:`~lightning_trak.running.data.annotated.AnnotatedBatch` and of :class:`~lightning_trak.running.data.singles.Singles`.

    Args:
        module: the model. If it is not a LightningModule, Lightning's default hooks are used.
        datamodule: the data module that gave the data, if there is one.
    """

    def __init__(self, module: nn.Module, datamodule: L.LightningDataModule | None = None) -> None:
        self._module: Any = module if is_a(module, L.LightningModule) else DataHooks()
        self._datamodule = datamodule

    def before(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Call ``on_before_batch_transfer``."""
        hook = self._owner("on_before_batch_transfer").on_before_batch_transfer
        return _on_users_batches(lambda own: hook(own, dataloader_idx), batch)

    def transfer(self, batch: Any, device: torch.device, dataloader_idx: int = 0) -> Any:
        """Call ``transfer_batch_to_device``."""
        hook = self._owner("transfer_batch_to_device").transfer_batch_to_device
        return _on_users_batches(lambda own: hook(own, device, dataloader_idx), batch, lambda notes: notes.to(device))

    def after(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Call ``on_after_batch_transfer``."""
        hook = self._owner("on_after_batch_transfer").on_after_batch_transfer
        return _on_users_batches(lambda own: hook(own, dataloader_idx), batch)

    def overridden(self) -> list[str]:
        """The hooks that are the user's own, each with its class."""
        owners = {hook: self._owner(hook) for hook in TRANSFER_HOOKS}
        return [
            f"{type(owner).__name__}.{hook}"
            for hook, owner in owners.items()
            if overrides(owner, hook, L.LightningDataModule if owner is self._datamodule else L.LightningModule)
        ]

    def _owner(self, hook: str) -> Any:
        own = self._datamodule is not None and overrides(self._datamodule, hook, L.LightningDataModule)
        return self._datamodule if own else self._module


def _on_users_batches(
    hook: Callable[[Any], Any], batch: Any, on_notes: Callable[[Tensor], Tensor] = lambda notes: notes
) -> Any:
    """Call a hook on the user's own batch, or on each of several, and put the results in their place."""
    if isinstance(batch, IndexedBatch):
        return batch._replace(batch=_on_users_batches(hook, batch.batch, on_notes))
    if isinstance(batch, Singles):
        return Singles(_on_users_batches(hook, one, on_notes) for one in batch)
    if isinstance(batch, AnnotatedBatch):
        return AnnotatedBatch(_on_users_batches(hook, batch.batch, on_notes), on_notes(batch.notes))
    return hook(batch)


def on_device(
    batches: Iterable[Any], device: torch.device, convert: Callable[[Any], Any], hooks: TransferHooks
) -> Iterator[Any]:
    """Yield batches as a Trainer gives them to the model.

    Args:
        batches: batches as the loader collates them, see :func:`~lightning_trak.running.data.loading.load`.
        device: the device.
        convert: gives a batch the precision of the weights, as ``convert_input`` of a Trainer's precision plugin does.
        hooks: the hooks that move the batches.
    """
    for batch in batches:
        batch = hooks.transfer(hooks.before(convert(batch)), device)
        yield hooks.after(batch)
