"""The loaders of what a user passes as data: of a data module, or of what ``loaders.py`` takes."""

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lightning_trak.packages import is_a
from lightning_trak.running.data.datamodules import loaders_of
from lightning_trak.running.data.loaders import PlainData, plain_loaders

Data = PlainData | L.LightningDataModule


def as_loaders(data: Data | Sequence[DataLoader[Any]] | None, stage: str, trainer: L.Trainer) -> list[DataLoader[Any]]:
    """Make loaders of map-style datasets from what a user passes as data.

    Args:
        data: the data as in :func:`~lightning_trak.running.data.loaders.as_loader`, a sequence of them, or a
            LightningDataModule. None, when the user forgot them, is refused.
        stage: ``"fit"`` uses a data module's ``train_dataloader()``, ``"predict"`` its ``predict_dataloader()``.
        trainer: the Trainer that a data module is attached to; see
            :func:`~lightning_trak.running.data.datamodules.loaders_of`.

    Raises:
        TypeError: if the data are none of these, or a dataset has no positions (an IterableDataset).
        ValueError: if a loader draws a subset, or makes no batches, so that examples have no positions.
    """
    return loaders_of(data, stage, trainer) if is_a(data, L.LightningDataModule) else plain_loaders(data)


def datamodule_of(data: Any) -> L.LightningDataModule | None:
    """The data, if they are a data module; else None."""
    return data if is_a(data, L.LightningDataModule) else None


def single_loader(data: Data | None, stage: str, trainer: L.Trainer) -> DataLoader[Any]:
    """The only loader that :func:`as_loaders` makes.

    Raises:
        ValueError: if there are several loaders.
    """
    loaders = as_loaders(data, stage, trainer)
    if len(loaders) != 1:
        what = "training set" if stage == "fit" else "set of targets"
        raise ValueError(f"expected one {what}, got {len(loaders)} loaders; join them with a ConcatDataset")
    return loaders[0]
