"""The LightningModule that ``trainer.predict`` runs for this package."""

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from torch import nn
from typing_extensions import Self

from lightning_trak.packages import is_a, own
from lightning_trak.running.batches import TransferHooks, on_device
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.transfer import Upload
from lightning_trak.storage.files import tensor_digest

if TYPE_CHECKING:
    _LightningModule = L.LightningModule
else:
    _LightningModule = object


class PredictModule(_LightningModule):
    """Holds a copy of the user's module, so that Lightning moves it to the device, and calls the user's batch hooks.

    A Trainer runs LightningModules of its own package alone, so modules are made by ``Kind.of(trainer)(...)``.

    Args:
        model: the copy.
        datamodule: the data module that gave the data, if there is one. It may have batch transfer hooks of its own.
    """

    @classmethod
    def of(cls, user: object) -> type[Self]:
        """This class as a LightningModule of the package that a Trainer or a module is from.

        Args:
            user: the Trainer that will run it, or a module from the same package.
        """
        return cast("type[Self]", _derived(cast(Any, cls), cast(Any, own(L.LightningModule, user))))

    def __init__(self, model: nn.Module, datamodule: L.LightningDataModule | None = None) -> None:
        super().__init__()
        # A rank without work calls no hook. No other rank waits for it, because there are no collectives.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.model = model
        self._hooks = TransferHooks(model, datamodule)
        self._upload: Upload | None = None

    def setup(self, stage: str) -> None:
        """Show the Trainer to the user's hooks, and check that all ranks have the same model.

        Lightning shows it to modules of its own package alone. No later hook runs on a rank without work.

        Raises:
            ValueError: if the weights differ.
        """
        if is_a(self.model, L.LightningModule):
            self.model.trainer = self.trainer
        ranks = Ranks.of(self.trainer)
        if ranks.world_size > 1:
            ranks.require_same_weights(self.weights_digest())

    def weights_digest(self) -> object:
        """A digest of the model's weights."""
        return tensor_digest(dict(self.model.named_parameters()))

    def release(self) -> None:
        """Drop the model, because the Trainer keeps this module until its next call."""
        del self.model, self._hooks

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call the user's hook on the user's batch."""
        return self._hooks.before(batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Call the user's hook on the user's batch, while the device computes."""
        if self._upload is None:
            self._upload = Upload(device)
        return self._upload(lambda: self._hooks.transfer(batch, device, dataloader_idx))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Call the user's hook on the user's batch."""
        return self._hooks.after(batch, dataloader_idx)

    def on_device(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Move batches of the user's loader to the device. The Trainer must be running.

        Args:
            batches: batches as the loader collates them.
        """
        return on_device(batches, self.device, self.trainer.precision_plugin.convert_input, self._hooks)


@functools.cache
def _derived(cls: Any, base: Any) -> Any:
    return type(cls.__name__, (cls, base), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
