"""What ``trainer.predict`` runs for this package."""

from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_trak.running.data import IndexedBatch, transfer_hook
from lightning_trak.running.transfer import Upload


class PredictModule(L.LightningModule):
    """Holds our copy of the user's module, so that Lightning moves it to the device, and uses the user's batch hooks.

    Args:
        model: the copy.
        datamodule: where the data came from, if it has batch transfer hooks of its own.
    """

    def __init__(self, model: nn.Module, datamodule: L.LightningDataModule | None = None) -> None:
        super().__init__()
        # A rank without work runs no hook, and there is no collective that the others could wait in.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.model = model
        self._datamodule = datamodule
        self._upload: Upload | None = None

    def release(self) -> None:
        """Let go of the model, since the Trainer keeps this module until its next call."""
        del self.model

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The user's hook, on the user's batch."""
        return self._hook("on_before_batch_transfer", batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The user's hook, on the user's batch, beside what the device is computing."""
        if self._upload is None:
            self._upload = Upload(device)
        return self._upload(lambda: self._hook("transfer_batch_to_device", batch, device, dataloader_idx))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The user's hook, on the user's batch."""
        return self._hook("on_after_batch_transfer", batch, dataloader_idx)

    def _hook(self, name: str, batch: Any, *args: Any) -> Any:
        hook = transfer_hook(name, self.model, self._datamodule)
        if isinstance(batch, IndexedBatch):
            return batch._replace(batch=hook(batch.batch, *args))
        return hook(batch, *args)
