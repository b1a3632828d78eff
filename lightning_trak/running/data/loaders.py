"""Makes a loader of a map-style dataset from what a user passes as data, or explains why that is not possible."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_trak.packages import is_a
from lightning_trak.running.data.samplers import require_whole
from lightning_trak.running.data.streaming import StreamingItems, is_streaming

DEFAULT_BATCH_SIZE = 32
WITHOUT_DATAMODULE = (
    "pass what its dataloader methods return, and put its batch transfer hooks, if it has any, into the module"
)


class MapStyle(Protocol):
    """An object that has examples at positions, such as a list of examples or a Hugging Face dataset."""

    def __len__(self) -> int:
        """The number of examples."""

    def __getitem__(self, index: int, /) -> Any:
        """The example at a position."""


PlainData = DataLoader[Any] | Dataset[Any] | MapStyle


def holds_several(data: Any) -> bool:
    """Whether the data are several sets: a list or tuple of loaders or datasets, not of examples."""
    return isinstance(data, (list, tuple)) and any(isinstance(item, DataLoader) or _is_dataset(item) for item in data)


def plain_loaders(data: Any) -> list[DataLoader[Any]]:
    """One loader for each set of data, see :func:`as_loader`."""
    return [as_loader(item) for item in data] if holds_several(data) else [as_loader(data)]


def as_loader(data: PlainData, whole: bool = True) -> DataLoader[Any]:
    """A loader of a map-style dataset.

    Args:
        data: a DataLoader, which is returned as it is. Or a map-style Dataset, any other object with ``__len__`` and
            ``__getitem__`` that has examples at positions, or a list of examples: these are loaded in batches of 32. A
            ``StreamingDataset`` of litdata, or a loader of one, counts as the dataset of its items at positions.
        whole: whether to refuse a loader that draws a subset.

    Raises:
        TypeError: if the data are none of these.
        ValueError: if the loader draws a subset or makes no batches, or there are no examples.
    """
    if not isinstance(data, DataLoader):
        if not _is_dataset(data) and not _is_list_of_examples(data):
            raise TypeError(_refusal(data))
        data = DataLoader(cast(Dataset[Any], data), batch_size=DEFAULT_BATCH_SIZE)
    if is_streaming(data.dataset):
        data = like(data, StreamingItems(data.dataset), batch_size=data.batch_size)
    dataset = data.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise TypeError(_refusal(dataset))
    if data.batch_sampler is None:
        raise ValueError("the loader makes no batches (batch_size=None); give it a batch_size")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty; pass at least one example")
    if whole:
        require_whole(data)
    return data


def like(loader: DataLoader[Any], dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
    """A new loader with the collate function, workers and other settings of a given one.

    Args:
        loader: the loader whose settings are copied.
        dataset: the dataset of the new loader.
        options: further arguments of the new DataLoader: its batches, and settings that differ.
    """
    same = {
        "collate_fn": loader.collate_fn,
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    return DataLoader(dataset, **(same | options))


def _is_dataset(data: Any) -> bool:
    """Whether an object has examples at positions and is clearly not something else, such as a batch."""
    if isinstance(data, Dataset):
        return is_streaming(data) or (not isinstance(data, IterableDataset) and hasattr(data, "__len__"))
    other = (str, bytes, bytearray, Mapping, Tensor, np.ndarray, np.generic, list, tuple, type, torch.nn.Module)
    if isinstance(data, (DataLoader, *other)) or is_a(data, CombinedLoader, L.LightningDataModule):
        return False
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or hasattr(data, "iloc"):
        return False  # pandas indexes rows by label, not by position
    try:
        return len(data) == 0 or data[0] is not None
    except Exception:  # for example a table that takes 0 for the name of a column
        return False


def _is_list_of_examples(data: Any) -> bool:
    """Whether this is a list of tuples, lists or mappings of the same form, or of objects of a class; not a batch."""
    if not isinstance(data, list) or not data:
        return False
    if _is_object(data[0]):  # such as graphs
        return all(type(item) is type(data[0]) for item in data)

    def form(item: Any) -> Any:
        return type(item), (set(item) if isinstance(item, Mapping) else len(item))

    if not all(isinstance(item, (tuple, list, Mapping)) for item in data):
        return False
    return all(form(item) == form(data[0]) for item in data) and not _looks_like_a_batch(data)


def _is_object(item: Any) -> bool:
    """Whether an item is of a class that says how an example looks, and not a value, a container, data or a model."""
    other = (Tensor, np.ndarray, np.generic, tuple, list, Mapping, Path, torch.nn.Module, DataLoader, Dataset)
    known = type(item).__module__ == "builtins" or isinstance(item, other)
    return not known and not is_a(item, CombinedLoader, L.LightningDataModule)


def _looks_like_a_batch(data: Any) -> bool:
    """Whether all leaves are tensors or arrays of the same length."""
    leaves = list(_leaves(data))
    if not leaves or not all(isinstance(leaf, (Tensor, np.ndarray)) and leaf.ndim > 0 for leaf in leaves):
        return False
    return len({len(leaf) for leaf in leaves}) == 1


def _leaves(data: Any) -> Iterator[Any]:
    if isinstance(data, (list, tuple, Mapping)):
        for item in data.values() if isinstance(data, Mapping) else data:
            yield from _leaves(item)
    else:
        yield data


def _refusal(data: Any) -> str:
    name = type(data).__name__
    return f"cannot attribute to a {name}: {_reason(data)}"


def _reason(data: Any) -> str:
    values: list[Any] = list(data.values()) if isinstance(data, Mapping) else []
    if type(data).__module__.startswith("litdata."):
        return "it mixes streams in an order of its own, so its examples have no positions; pass each StreamingDataset"
    if data is None:
        return "there are no data; pass a DataLoader, a map-style Dataset or a LightningDataModule"
    if isinstance(data, type):
        return f"{data.__name__} is a class; pass an instance of it"
    if isinstance(data, (str, Path)):
        return f'"{data}" is a text, not data; load the data that it names, and pass them as a Dataset or DataLoader'
    if is_a(data, L.LightningDataModule):
        return f"a data module is not taken here; {WITHOUT_DATAMODULE}"
    if is_a(data, CombinedLoader) or any(isinstance(value, DataLoader) for value in values):
        return "it holds several loaders; pass them one by one, or pass score a list of them"
    if holds_several(data):
        return "it holds several sets of data; pass one of them, or join them with a ConcatDataset"
    if any(_is_dataset(value) for value in values):
        return f"it holds several datasets; pass one of them: {', '.join(map(repr, data))}"
    if isinstance(data, IterableDataset):
        return (
            "an iterable dataset gives its examples one after another, and has no positions, which scores are indexed"
            " by; load a map-style dataset (of Hugging Face: without streaming=True), or make a list of what it gives"
        )
    if isinstance(data, (Tensor, np.ndarray)):
        return (
            "it may be a batch or a dataset; if its rows are the examples, use torch.utils.data.TensorDataset, which"
            " gives each example as a tuple"
        )
    if isinstance(data, Mapping):
        return (
            "it may be a single batch, an example or the columns of a dataset; for columns, use"
            " torch.utils.data.StackDataset(**columns), which gives each example as a dict"
        )
    if isinstance(data, (list, tuple)):
        if not data:
            return "it is empty; pass at least one example"
        return (
            "a list must hold loaders, datasets or examples. Examples must be tuples, lists or dicts of the same form,"
            " or objects of one class."
            " Tensors of the same length are not accepted, because they may be a single batch. For a batch (inputs,"
            " labels), use torch.utils.data.TensorDataset(inputs, labels); for other lists of examples, use"
            " DataLoader(examples, batch_size=..., collate_fn=...)"
        )
    return (
        "expected a DataLoader, Dataset or LightningDataModule over a map-style dataset (with __len__ and __getitem__,"
        " where item 0 is an example), because scores are indexed by the position in the dataset"
    )
