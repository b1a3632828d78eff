"""Writing local files so that a reader, or a crash, never meets half of one."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
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
