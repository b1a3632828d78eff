"""Weights from any kind of checkpoint, as plain state dicts on CPU."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_trak.checkpoints.series import Snapshot, SnapshotSeries
from lightning_trak.checkpoints.weights import is_extra_state, read_safetensors, without_extra_state
from lightning_trak.storage.files import tensor_digest
from lightning_trak.storage.locations import locate, require_regular

CheckpointSource = str | os.PathLike[str] | Mapping[str, Tensor]
CheckpointsLike = CheckpointSource | Sequence[CheckpointSource]

_told = WarningCache()  # says a thing once

_TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can be loaded when they are needed.

    Attributes:
        name: short label for messages, such as the file's name.
        read: reads the state dict.
        record: step, epoch and optimizer settings, for a snapshot of a series.
    """

    name: str
    read: Callable[[], dict[str, Tensor]]
    record: Snapshot | None = None

    def load(self) -> dict[str, Tensor]:
        """The state dict, name -> tensor on CPU, under the names that it was saved with. Not to be written into.

        Raises:
            FileNotFoundError: if the file is gone.
            ValueError: if it is damaged, or needs ``weights_only=False``.
            TypeError: if it holds something other than tensors.
        """
        return self.read()

    def fingerprint(self) -> str:
        """SHA-256 over sorted names, dtypes, shapes and bytes: equal for equal weights in any kind of file."""
        weights = self.load()
        return self.record.sha256 if self.record else tensor_digest(weights)  # load() has compared that of a snapshot


def resolve_checkpoints(checkpoints: CheckpointsLike, weights_only: bool = True) -> list[Checkpoint]:
    """Find the checkpoints that a user names, without loading weights yet.

    Args:
        checkpoints: one of these, or a list that may mix them, in the order wanted:

            - a directory that :class:`~lightning_trak.callbacks.snapshots.TRAKCallback` has written: all its snapshots;
            - a ``.safetensors`` file;
            - a Lightning ``.ckpt`` or a ``.pt``, ``.pth`` or ``.bin`` file of ``torch.save``: its ``"state_dict"`` when
              it has one, else all of it;
            - a state dict in memory, copied here so that later training or loading does not change it.

            Paths may be local or URLs that fsspec understands.
        weights_only: False lets ``torch.load`` run code from the files, which those need that hold pickled objects,
            such as hyperparameters. Only for files from a source you trust.

    Returns:
        At least one checkpoint.

    Raises:
        TypeError: if an item is none of these.
        ValueError: if there are no checkpoints, or two state dicts in memory are one model's live tensors.
        FileNotFoundError: if a file, or a snapshot that a manifest names, does not exist.
    """
    items = list(checkpoints) if isinstance(checkpoints, (list, tuple)) else [checkpoints]
    if not items:
        raise ValueError("no checkpoints: got an empty list; pass a snapshot directory or a list with at least one")
    resolved: list[Checkpoint] = []
    seen: dict[frozenset[tuple[str, int]], int] = {}
    for position, item in enumerate(items):
        if isinstance(item, Mapping):
            name = f"state dict {position}"
            tensors = _state_dict(item, name)
            memory = frozenset((key, tensor.data_ptr()) for key, tensor in tensors.items())
            first = seen.setdefault(memory, position)
            if first != position:
                raise ValueError(
                    f"checkpoints {first} and {position} are the same tensors in memory: state_dict() returns a model's"
                    " live weights; keep copy.deepcopy(model.state_dict()) instead"
                )
            copied = {key: tensor.cpu().clone() for key, tensor in tensors.items()}
            resolved.append(Checkpoint(name, partial(dict, copied)))
        elif isinstance(item, (str, os.PathLike)):
            resolved += _find(os.fspath(item), weights_only)
        else:
            raise TypeError(
                "expected a snapshot directory, a safetensors, .ckpt or .pt path, or a state dict as checkpoint"
                f" {position}, got {type(item).__name__}"
            )
    return resolved


def _find(location: str, weights_only: bool) -> list[Checkpoint]:
    suffix = PurePosixPath(location).suffix.lower()
    if suffix != ".safetensors" and suffix not in _TORCH_SUFFIXES:
        return _snapshots(SnapshotSeries(location))
    filesystem, path = locate(location)
    if not filesystem.exists(path):
        raise FileNotFoundError(f'checkpoint "{location}" does not exist')
    if filesystem.isdir(path):
        return _snapshots(SnapshotSeries(location))
    read = (
        partial(_read_safetensors, filesystem, path, location)
        if suffix == ".safetensors"
        else partial(_read_torch, filesystem, path, location, weights_only)
    )
    return [Checkpoint(PurePosixPath(path).name, read)]


def _snapshots(series: SnapshotSeries) -> list[Checkpoint]:
    snapshots = series.read().snapshots
    if not snapshots:
        raise ValueError(f'"{series.directory}" holds no snapshots yet; train with TRAKCallback until it has saved one')
    missing = [snapshot.file for snapshot in snapshots if not series.filesystem.exists(series.path(snapshot.file))]
    if missing:
        raise FileNotFoundError(
            f'"{series.directory}" lacks {len(missing)} of the {len(snapshots)} snapshots in its manifest, first'
            f' "{missing[0]}"; restore the files, or pass a list of those that you want'
        )
    name = PurePosixPath(series.url).name
    return [Checkpoint(f"{name}/{entry.file}", partial(series.load, entry), entry) for entry in snapshots]


def _read_safetensors(filesystem: Any, path: str, location: str) -> dict[str, Tensor]:
    return _state_dict(read_safetensors(filesystem, path, location), f'"{location}"')


def _read_torch(filesystem: Any, path: str, location: str, weights_only: bool) -> dict[str, Tensor]:
    if isinstance(filesystem, LocalFileSystem):
        require_regular(path)
    try:
        if isinstance(filesystem, LocalFileSystem):
            # only the weights are read from disk then, not the optimizer's state; files of old formats do not allow it
            content = torch.load(path, "cpu", weights_only=weights_only, mmap=zipfile.is_zipfile(path))
        else:
            with filesystem.open(path, "rb") as file:
                content = torch.load(file, "cpu", weights_only=weights_only)
    except OSError:
        raise
    except Exception as error:  # torch and pickle raise many kinds for a damaged file
        refused = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", str(error), re.IGNORECASE)
        if weights_only and isinstance(error, UnpicklingError) and refused:
            raise ValueError(
                f'"{location}" holds more than tensors and plain values: it needs {refused[1]}. weights_only=False'
                " reads it by running code from the file, so use that only for files from a source you trust"
            ) from error
        raise ValueError(f'"{location}" is truncated or not a file of torch.save: {error!r}') from error
    return _state_dict(content, f'"{location}"')


def _state_dict(content: Any, source: str) -> dict[str, Tensor]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise TypeError(f"expected a state dict in {source}, got {type(content).__name__}")
    tensors = without_extra_state(content, source)
    if not tensors:
        raise ValueError(f"the state dict in {source} is empty")
    extra = [name for name in content if is_extra_state(name)]
    if extra:
        _told.warn(
            f"{', '.join(extra)} in {source} is extra state of modules, which is not loaded: the model keeps its own"
        )
    # Lazy signs would be in the way of those who look at the bytes.
    return {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in tensors.items()}
