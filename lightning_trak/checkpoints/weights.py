"""State dicts in safetensors files.

A file holds each distinct tensor once. The metadata in its header maps each other name of a tied tensor to the name
that is stored, as ``safetensors.torch.save_model`` does. It also has a checksum of the whole state dict. If the model
was trained on a part of the training set, the header says on which part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.compatibility import EXTRA_STATE, is_traceable_wrapper_subclass
from lightning_trak.storage.files import all_tensors, tensor_digest, write_atomically
from lightning_trak.storage.locations import Location, locate

_HEADER = "lightning_trak"
_MAX_HEADER_BYTES = 100_000_000  # as in safetensors
_ADVICE = "restore it from a copy or make it again, or pass a list of the paths of other snapshots"

# The dtypes that all versions of safetensors know; others are stored as bytes.
_NATIVE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def is_extra_state(name: Any) -> bool:
    """Whether this is the name of a module's extra state, the result of its ``get_extra_state()``."""
    return isinstance(name, str) and name.rpartition(".")[2] == EXTRA_STATE


def without_extra_state(state_dict: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a state dict, without the extra state of modules.

    Args:
        state_dict: the result of a module's ``state_dict()``.
        source: the name of the state dict in messages.

    Raises:
        TypeError: if any other entry is not a dense tensor in memory; the error names the first.
    """
    tensors = {name: value for name, value in state_dict.items() if not is_extra_state(name)}
    for name, value in tensors.items():
        found = _unfit(value) if isinstance(name, str) else "not a name"
        if found:
            raise TypeError(f"{source} must map names to dense tensors, but {name!r} is {found}")
    return tensors


def _unfit(value: Any) -> str | None:
    """Why a value cannot be stored as a tensor; None if it can."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if nn.parameter.is_lazy(value):
        return "not initialized yet; run a batch through the model before training"
    if is_traceable_wrapper_subclass(value):
        return f"a {type(value).__name__}, which wraps other tensors"
    advice = "; register it with persistent=False, so that it keeps the value that the model gives it"
    if value.layout != torch.strided or value.is_nested:
        return f"a {'nested' if value.is_nested else value.layout} tensor{advice}"
    if value.is_quantized:
        return f"a quantized tensor{advice}"
    return "a tensor on the meta device, without content" if value.is_meta else None


def pack(
    state_dict: Mapping[str, Tensor], subset: TrainingSubset | None = None
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Prepare tensors for a safetensors file.

    Args:
        state_dict: dense tensors on any device; tied and non-contiguous ones are allowed.
        subset: the training examples that the model has seen; None: all of them.

    Returns:
        Contiguous CPU copies of the distinct tensors; the metadata; and the checksum of the whole state dict,
        :func:`~lightning_trak.storage.files.tensor_digest`.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    holders: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_dict.items():
        signs = tensor.is_conj(), tensor.is_neg()
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), signs)
        holder = holders.setdefault(view, name) if tensor.data_ptr() else name
        if holder != name:
            aliases[name] = holder
        else:  # each gets its own copy, because safetensors also refuses overlapping views
            copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
            tensors[name] = copy.copy_(tensor.detach())
    digest = tensor_digest(tensors | {name: tensors[holder] for name, holder in aliases.items()})
    as_bytes = {name: tensor for name, tensor in tensors.items() if tensor.dtype not in _NATIVE}
    kinds = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in as_bytes.items()}
    seen = {} if subset is None else {"subset": subset.to_json()}
    header = json.dumps({"sha256": digest, "as_bytes": kinds, **seen})
    stored = tensors | {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in as_bytes.items()}
    return stored, aliases | {_HEADER: header}, digest


def read_safetensors(location: Location, size: int | None = None, digest: str | None = None) -> dict[str, Tensor]:
    """Read a safetensors file, tied tensors included, and check it against its checksum if it has one.

    Args:
        location: of the file.
        size: the number of bytes that the file must have; default: any.
        digest: the checksum that the state dict must have; default: the one in the file's header, if there is one.

    Returns:
        Name -> tensor on CPU; tied names share one tensor.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is truncated, altered or not a safetensors file.
    """
    try:
        location.require_regular()
        if location.is_local:
            with open(location.path, "rb") as opened:  # safetensors would say "no such file" without permission to read
                _require_size(os.fstat(opened.fileno()).st_size, size, location)
            with safe_open(location.path, framework="pt") as file:
                tensors = all_tensors(file)
                metadata = file.metadata() or {}
        else:
            content = location.filesystem.cat_file(location.path)
            _require_size(len(content), size, location)
            tensors = safetensors.torch.load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = header.get("__metadata__", {})
    except (SafetensorError, KeyError) as error:  # KeyError: safetensors knows the dtype, torch does not
        raise ValueError(f'"{location}" is truncated or not a safetensors file: {error}; {_ADVICE}') from error
    try:
        own = json.loads(metadata.pop(_HEADER, '{"sha256": null}'))
        for name, (dtype, shape) in own.get("as_bytes", {}).items():
            tensors[name] = tensors[name].view(getattr(torch, dtype)).reshape(shape)
        expected = digest or own["sha256"]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'the header of "{location}" was altered: {error!r}; {_ADVICE}') from error
    tensors |= {name: tensors[kept] for name, kept in metadata.items() if kept in tensors and name not in tensors}
    if expected is not None and tensor_digest(tensors) != expected:
        raise ValueError(f'"{location}" was altered or replaced: its content does not match its checksum; {_ADVICE}')
    return tensors


def write_safetensors(path: Path, state_dict: Mapping[str, Tensor], subset: TrainingSubset | None = None) -> str:
    """Write a local safetensors file, whole or not at all.

    Args:
        path: the path of the file. An existing file is replaced.
        state_dict: as for :func:`pack`.
        subset: as for :func:`pack`.

    Returns:
        The checksum of the state dict.
    """
    tensors, metadata, digest = pack(state_dict, subset)
    write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))
    return digest


def read_about(location: str) -> tuple[str | None, TrainingSubset | None]:
    """What the header of a safetensors file says of its weights. The weights themselves are not read.

    Args:
        location: a path or URL.

    Returns:
        The checksum of the state dict, and the training examples that the model has seen; None where it says nothing.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not a safetensors file, or its header was altered.
    """
    found = locate(location)
    found.require_regular()
    with found.filesystem.open(found.path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        content = file.read(size) if size <= _MAX_HEADER_BYTES else b""
    try:
        metadata = json.loads(content).get("__metadata__", {})
    except (AttributeError, ValueError) as error:
        raise ValueError(f'"{location}" is truncated or not a safetensors file: {error!r}; {_ADVICE}') from error
    try:
        own = json.loads(metadata.get(_HEADER, "{}"))
        subset = own.get("subset")
        return own.get("sha256"), None if subset is None else TrainingSubset.from_json(subset)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'the header of "{location}" was altered: {error}; {_ADVICE}') from error


def _require_size(found: int, expected: int | None, location: Location) -> None:
    if expected is not None and found != expected:
        raise ValueError(
            f'"{location}" is truncated or was replaced: it has {found} bytes, but its manifest says {expected};'
            f" {_ADVICE}"
        )
