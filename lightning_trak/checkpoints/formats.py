"""The kinds of checkpoints that can be read."""

from __future__ import annotations

import functools
import re
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath
from pickle import UnpicklingError
from typing import Any

import torch
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor
from typing_extensions import override

from lightning_trak.checkpoints.base import Checkpoint, CheckpointFormat
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.checkpoints.weights import is_extra_state, read_about, read_safetensors, without_extra_state
from lightning_trak.storage.locations import Location, locate

_warned = WarningCache()  # gives each warning once


class SnapshotDirectory(CheckpointFormat):
    """A directory that :class:`~lightning_trak.TRAKCallback` has written: all its snapshots."""

    @classmethod
    @override
    def recognizes(cls, location: str) -> bool:
        del location
        return True  # this format is asked last

    @classmethod
    @override
    def find(cls, location: str, weights_only: bool) -> list[Checkpoint]:
        del weights_only
        series = SnapshotSeries(location)
        if series.filesystem.isfile(series.path("").rstrip("/")):
            raise ValueError(
                f'"{location}" is a file of no known kind: names of checkpoint files end in .safetensors, .ckpt, .pt,'
                " .pth or .bin; rename it if torch.save wrote it"
            )
        snapshots = series.read().snapshots
        if not snapshots:
            raise ValueError(
                f'"{series.directory}" holds no snapshots yet; train with TRAKCallback until it has saved a snapshot'
            )
        files = [file for snapshot in snapshots for file in snapshot.files]
        missing = [file for file in files if not series.filesystem.exists(series.path(file))]
        if missing:
            raise FileNotFoundError(
                f'"{series.directory}" lacks {len(missing)} of the {len(files)} files in its manifest, the'
                f' first is "{missing[0]}"; restore the files, or pass a list of the paths that you want'
            )
        name = PurePosixPath(series.url).name
        return [
            Checkpoint(f"{name}/{entry.file}", partial(series.load, entry), entry, read_file=series.load)
            for entry in snapshots
        ]


class SafetensorsFile(CheckpointFormat):
    """A ``.safetensors`` file. One that a fleet has written says which training examples its model has seen."""

    @classmethod
    @override
    def recognizes(cls, location: str) -> bool:
        return _is_file(location, ".safetensors")

    @classmethod
    @override
    def find(cls, location: str, weights_only: bool) -> list[Checkpoint]:
        found = locate(location)
        _, subset = read_about(location)
        return [Checkpoint(PurePosixPath(found.path).name, partial(read_weights, found, weights_only), subset=subset)]


class TorchFile(CheckpointFormat):
    """A Lightning ``.ckpt`` file, or a file of ``torch.save``: its ``"state_dict"`` if it has one, else all of it."""

    @classmethod
    @override
    def recognizes(cls, location: str) -> bool:
        return _is_file(location, ".ckpt", ".pt", ".pth", ".bin")

    @classmethod
    @override
    def find(cls, location: str, weights_only: bool) -> list[Checkpoint]:
        found = locate(location)
        return [Checkpoint(PurePosixPath(found.path).name, partial(read_weights, found, weights_only))]


def _is_file(location: str, *suffixes: str) -> bool:
    """Whether a path has one of these suffixes and is not a directory.

    Raises:
        FileNotFoundError: if it has one of the suffixes and does not exist.
    """
    if PurePosixPath(location).suffix.lower() not in suffixes:
        return False
    filesystem, path, _ = locate(location)
    if not filesystem.exists(path):
        raise FileNotFoundError(f'checkpoint "{location}" does not exist; check the path')
    return not filesystem.isdir(path)


def read_weights(location: Location, weights_only: bool) -> dict[str, Tensor]:
    """The weights in a file of safetensors or of ``torch.save``; the arguments are those of :func:`load_torch`."""
    content: Any
    if PurePosixPath(location.name).suffix.lower() == ".safetensors":  # the path may be what a link leads to
        content = read_safetensors(location)
    else:
        content = load_torch(location, weights_only)
    return state_dict(content, f'"{location}"')


def load_torch(location: Location, weights_only: bool) -> Any:
    """The content of a file of ``torch.save``, with its tensors on the CPU.

    Args:
        location: of the file.
        weights_only: False lets the file run code.

    Raises:
        ValueError: if the file is damaged, or can only be read with ``weights_only=False``.
    """
    filesystem, path, _ = location
    location.require_regular()
    _require_intact(location, filesystem.checksum(path))
    try:
        if location.is_local:
            # With mmap only the weights are read from disk, not the optimizer's state. Old formats do not allow mmap.
            return torch.load(path, "cpu", weights_only=weights_only, mmap=zipfile.is_zipfile(path))
        with filesystem.open(path, "rb") as file:
            return torch.load(file, "cpu", weights_only=weights_only)
    except OSError:
        raise
    except Exception as error:  # torch and pickle raise many types of errors for a damaged file
        refused = re.search(r"unsupported (?:global: )?GLOBAL (\S+)", str(error), re.IGNORECASE)
        if weights_only and isinstance(error, UnpicklingError) and refused:
            raise ValueError(
                f'"{location}" holds more than tensors and plain values: it needs {refused[1]}. weights_only=False'
                " reads it, but runs code from the file; use that only for files from a source you trust"
            ) from error
        raise ValueError(f'"{location}" is truncated, or was not written by torch.save: {error!r}') from error


@functools.cache  # each version of a file is checked once
def _require_intact(location: Location, version: object) -> None:
    """Compare what a file of ``torch.save`` holds with the checksums in it, which ``torch.load`` does not do.

    Args:
        location: of the file.
        version: differs when the file has changed.

    Raises:
        ValueError: if the file was altered.
    """
    del version
    with location.filesystem.open(location.path, "rb") as file:
        try:
            damaged = _damaged_part(file)
        except Exception as error:  # zipfile raises many types of errors
            damaged = repr(error)
    if damaged is not None:
        raise ValueError(
            f'"{location}" was altered: its content does not match its checksums ({damaged}); restore it from a copy'
        )


def _damaged_part(file: Any) -> str | None:
    """The name of a part of a file of ``torch.save`` that does not match its checksum; None if there is none."""
    if not zipfile.is_zipfile(file):
        return None  # an old format, or no file of torch.save: torch.load says so
    with zipfile.ZipFile(file) as archive:
        if not any(part.CRC for part in archive.infolist()):
            return None  # written after torch.serialization.set_crc32_options(False)
        return archive.testzip()


def state_dict(content: Any, source: str) -> dict[str, Tensor]:
    """The weights in the content of a checkpoint.

    Args:
        content: a state dict, or a mapping that has one under ``"state_dict"``. Or a mapping with one state dict of a
            module beside other things, under any name, such as ``fabric.save`` writes.
        source: the name of the checkpoint in messages.

    Raises:
        TypeError: if there is no state dict.
        ValueError: if the state dict has no tensors, or there are several.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    elif isinstance(content, Mapping) and (named := _of_modules(content)):
        if len(named) > 1:
            raise ValueError(
                f"{source} holds several state dicts, under {', '.join(map(repr, named))}: load it with torch.load, and"
                " pass the one of this model as a checkpoint"
            )
        content = content[named[0]]
    if not isinstance(content, Mapping):
        advice = "; save its state_dict() in its place" if isinstance(content, torch.nn.Module) else ""
        raise TypeError(f"{source} must hold a state dict, got {type(content).__name__}{advice}")
    tensors = without_extra_state(content, source)
    if not tensors:
        raise ValueError(f"the state dict in {source} is empty; save the state_dict() of the trained module")
    extra = [name for name in content if is_extra_state(name)]
    if extra:
        _warned.warn(
            f"the extra state of modules in {source} is not loaded, the model keeps its own: {', '.join(extra)}"
        )
    # Resolve lazy conjugation and negation, so that the bytes are the values.
    return {name: tensor.detach().resolve_conj().resolve_neg() for name, tensor in tensors.items()}


def _of_modules(content: Mapping[Any, Any]) -> list[Any]:
    """The names under which a mapping has state dicts of modules, with tensors alone."""
    return [
        name
        for name, value in content.items()
        if isinstance(value, Mapping)
        and not is_extra_state(name)
        and value
        and all(isinstance(tensor, Tensor) or is_extra_state(key) for key, tensor in value.items())
    ]
