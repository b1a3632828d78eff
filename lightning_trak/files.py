"""Writing local files so that a reader, or a crash, never meets half of one."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_atomically(path: Path, write: Callable[[Path], None], replace: bool = True) -> None:
    """Write a file under a temporary name in its folder, flush it to disk, and move it into place.

    Args:
        path: where the file will be.
        write: writes the content to the path that it is given.
        replace: whether a file that stands there is replaced, in one step.

    Raises:
        FileExistsError: if ``replace`` is false and a file stands there, which is then left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        _flush(temporary)
        if replace:
            os.replace(temporary, path)
        else:
            os.link(temporary, path)
        _flush(path.parent)  # the rename itself, so that it survives a power failure
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any], replace: bool = True) -> None:
    """Write JSON as :func:`write_atomically` does."""

    def write(temporary: Path) -> None:
        temporary.write_text(json.dumps(content, indent=2) + "\n")

    write_atomically(path, write, replace)


def read_manifest(directory: str | Path, what: str, version: int, advice: str) -> dict[str, Any]:
    """The ``manifest.json`` of a directory.

    Args:
        directory: where it is.
        what: what has such a manifest, such as ``"feature store"``, for messages.
        version: its ``"format"`` that this version reads.
        advice: what to do if there is none.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not one, or of another format.
    """
    path = Path(directory).expanduser() / "manifest.json"
    if not path.exists():
        raise FileNotFoundError(f'"{directory}" is not a {what} yet; {advice}')
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        found = manifest["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f'"{path}" is not the manifest of a {what}: {error!r}') from error
    if found != version:
        raise ValueError(f'{what} "{directory}" has format {found}; this version reads {version}')
    return manifest


def save_tensors(path: Path, tensors: dict[str, Tensor], **metadata: Any) -> None:
    """Write a safetensors file as :func:`write_atomically` does, with a checksum and JSON-able metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry, since safetensors writes several in any order, and equal content should give equal files.
    header = {"lightning_trak": json.dumps({"sha256": tensor_digest(tensors), **metadata})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header))


def load_tensors(path: Path, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote, memory-mapped.

    Args:
        path: of the file.
        verify: whether to compare the checksum with the tensors.

    Returns:
        The tensors and the metadata, ``"sha256"`` among them.

    Raises:
        ValueError: if the file is truncated or altered, saying how.
    """
    metadata = load_metadata(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if verify and metadata["sha256"] != tensor_digest(tensors):
        raise ValueError("its checksum does not match its content")
    return tensors, metadata


def load_metadata(path: Path) -> dict[str, Any]:
    """The metadata of what :func:`save_tensors` wrote.

    Raises:
        ValueError: as :func:`load_tensors`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {})["lightning_trak"])
        if not isinstance(metadata.get("sha256"), str):
            raise KeyError("sha256")
    except (SafetensorError, OSError) as error:
        raise ValueError(str(error)) from error
    except (AttributeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError("its header lacks the checksum") from error
    return metadata


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
