"""State dicts in safetensors files.

A file holds each distinct tensor once. Its header's metadata maps the names of tied tensors to the name that holds
theirs, as ``safetensors.torch.save_model`` does, and has a checksum of the whole state dict.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_trak.compatibility import EXTRA_STATE, is_traceable_wrapper_subclass
from lightning_trak.storage.files import tensor_digest
from lightning_trak.storage.locations import require_regular

_HEADER = "lightning_trak"
_ADVICE = "restore it from a copy, or pass a list of the paths of other snapshots"

# What every safetensors has had a name for; others are stored as bytes.
_NATIVE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def is_extra_state(name: Any) -> bool:
    """Whether this is the name of what a module's ``get_extra_state()`` gave."""
    return isinstance(name, str) and name.rpartition(".")[2] == EXTRA_STATE


def without_extra_state(state_dict: Mapping[Any, Any], source: str) -> dict[str, Tensor]:
    """The tensors of a state dict.

    Args:
        state_dict: what a module's ``state_dict()`` gave.
        source: what to call it in messages.

    Raises:
        TypeError: if another entry than extra state is no dense tensor that is in memory, naming the first.
    """
    tensors = {name: value for name, value in state_dict.items() if not is_extra_state(name)}
    for name, value in tensors.items():
        found = _unfit(value) if isinstance(name, str) else "not a name"
        if found:
            raise TypeError(f"expected a state dict of names and dense tensors in {source}, but {name!r} is {found}")
    return tensors


def _unfit(value: Any) -> str | None:
    """The reason why a value cannot be stored as a tensor; None if it can."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if nn.parameter.is_lazy(value):
        return "not initialized yet; run a batch through the model before training"
    if is_traceable_wrapper_subclass(value):
        return f"a {type(value).__name__}, which is laid over other tensors"
    advice = "; register it with persistent=False, and it stays as the model makes it"
    if value.layout != torch.strided or value.is_nested:
        return f"a {'nested' if value.is_nested else value.layout} tensor{advice}"
    if value.is_quantized:
        return f"a quantized tensor{advice}"
    return "a tensor on the meta device, without content" if value.is_meta else None


def pack(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Prepare tensors for a safetensors file.

    Args:
        state_dict: dense tensors on any device; tied and non-contiguous ones are allowed.

    Returns:
        Contiguous CPU copies of the distinct tensors; the metadata; and the checksum of the state dict, which is
        :func:`~lightning_trak.storage.files.tensor_digest` of all of it.
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
        else:  # a copy of its own, because safetensors refuses overlapping views as well
            copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
            tensors[name] = copy.copy_(tensor.detach())
    digest = tensor_digest(tensors | {name: tensors[holder] for name, holder in aliases.items()})
    as_bytes = {name: tensor for name, tensor in tensors.items() if tensor.dtype not in _NATIVE}
    kinds = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in as_bytes.items()}
    header = json.dumps({"sha256": digest, "as_bytes": kinds})
    stored = tensors | {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in as_bytes.items()}
    return stored, aliases | {_HEADER: header}, digest


def read_safetensors(
    filesystem: Any, path: str, location: str, size: int | None = None, digest: str | None = None
) -> dict[str, Tensor]:
    """Read a safetensors file, tied tensors included, and compare it with its checksum if it has one.

    Args:
        filesystem: that of :func:`~lightning_trak.storage.locations.locate`.
        path: where the file is on it.
        location: what to call the file in messages.
        size: number of bytes that it must have; default: any.
        digest: checksum that the state dict must have; default: that in the file's header, if there is one.

    Returns:
        Name -> tensor on CPU; tied names share one tensor.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, altered or not a safetensors file.
    """
    try:
        if isinstance(filesystem, LocalFileSystem):
            require_regular(path)
            with open(path, "rb") as opened:  # safetensors says "no such file" of one that it may not read
                _require_size(os.fstat(opened.fileno()).st_size, size, location)
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        else:
            content = filesystem.cat_file(path)
            _require_size(len(content), size, location)
            tensors = safetensors.torch.load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = header.get("__metadata__", {})
    except (SafetensorError, KeyError) as error:  # a KeyError from a dtype that safetensors has and torch has not
        raise ValueError(f'"{location}" is truncated or not a safetensors file: {error}') from error
    try:
        own = json.loads(metadata.pop(_HEADER, '{"sha256": null}'))
        for name, (dtype, shape) in own.get("as_bytes", {}).items():
            tensors[name] = tensors[name].view(getattr(torch, dtype)).reshape(shape)
        expected = digest or own["sha256"]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f'the header of "{location}" was altered: {error!r}; {_ADVICE}') from error
    tensors |= {name: tensors[kept] for name, kept in metadata.items() if kept in tensors and name not in tensors}
    if expected is not None and tensor_digest(tensors) != expected:
        raise ValueError(
            f'"{location}" was altered, or is another file than was written here: its checksum does not match its'
            f" content; {_ADVICE}"
        )
    return tensors


def _require_size(found: int, expected: int | None, location: str) -> None:
    if expected is not None and found != expected:
        raise ValueError(
            f'"{location}" is truncated, or another file than was written here: it has {found} bytes, and its manifest'
            f" says {expected}; {_ADVICE}"
        )
