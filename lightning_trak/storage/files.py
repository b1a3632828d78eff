"""Local files. A file is there as a whole or not at all, even after a crash, and it is checked when it is read.

A process writes a file in a hidden folder beside it, ``.NAME.HOST-PID-RANDOM.tmp``, and then moves it. A killed process
leaves files in this folder only. The name of the folder tells :func:`remove_leftovers` which process made it.
"""

import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_trak.storage.locks import Lock
from lightning_trak.storage.paths import kind_of
from lightning_trak.storage.schemas import Schema, anything, parse_json, sealed, sha256, with_checksum

_LEFTOVER = re.compile(r"\..+\.(?P<host>[0-9a-f]{12})-(?P<pid>[0-9]{1,9})-[0-9a-f]{8}\.tmp")
_SECONDS_KEPT = 24 * 3600  # for files of a process on another host, since this host cannot know whether it is alive
_MAX_JSON_BYTES = 1 << 28
_HEADER = sealed({"sha256": sha256}, others=anything)


class DamagedFileError(ValueError):
    """The content of a file is not what was written.

    Args:
        path: the file.
        reason: what is wrong, such as ``"is a FIFO, not a file"``.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f'"{self.path}" {self.reason}'


def altered(path: Path, reason: str) -> DamagedFileError:
    """The error for a file with wrong content."""
    return DamagedFileError(path, f"is truncated or altered ({reason})")


def write_atomically(path: Path, write: Callable[[Path], object], replace: bool = True) -> None:
    """Write a file in a temporary folder on the same disk, flush it, and move it into place.

    Args:
        path: the path of the file. Its permissions follow the process's umask.
        write: a function that writes the content to the path that it gets.
        replace: whether to replace an existing file, in one step.

    Raises:
        FileExistsError: if ``replace`` is false and there is a file, which is not changed.
        NotADirectoryError: if there is a file in the place of its folder.
        OSError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from None
    folder = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    temporary = folder / f".{path.name}"
    try:
        with _os_errors(path):
            folder.mkdir()
            usual = folder / "usual"  # not the file itself, since some file systems replace files slowly
            usual.touch()
            mode = stat.S_IMODE(usual.stat().st_mode)
            write(temporary)
            if stat.S_IMODE(temporary.stat().st_mode) != mode:  # safetensors makes files that only this user may read
                temporary.chmod(mode)
            _flush(temporary)
            if replace:
                os.replace(temporary, path)
            else:
                _move_new(temporary, path)
            _flush_directory(path.parent)  # the move itself, so that it survives a power failure
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move_new(temporary: Path, path: Path) -> None:
    """Move a file to a path where there is no file. If several processes try, only one can do it.

    Raises:
        FileExistsError: if there is a file already.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # this file system may have no hard links; after any other error, the move fails, too
        # A lock is better than a file that says who is writing: when a process dies, the kernel releases its lock.
        with closing(_lock_directory(path.parent)):
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
            os.replace(temporary, path)


def _lock_directory(directory: Path) -> Lock:
    lock = Lock(directory)
    try:
        lock.take()
    except OSError as error:
        raise OSError(
            f'"{directory}" is on a file system with neither hard links nor locks ({error}), so two runs could write'
            " the same file; use another directory"
        ) from error
    return lock


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_directory(path: Path) -> None:
    try:
        _flush(path)
    except OSError as error:
        # Some file systems cannot flush a directory. They keep moved files as safe as they can.
        unable = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM)
        if error.errno not in unable:
            raise


@functools.cache
def _host() -> str:
    """A digest for this machine since its last start, and for the namespace of process ids."""
    parts = [platform.node()]
    with suppress(OSError):  # these files exist on Linux only
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def remove_leftovers(directory: Path) -> None:
    """Remove temporary folders of :func:`write_atomically` in a directory, if the processes that made them are dead.

    Folders of processes on other hosts are removed after a day.
    """
    for name in os.listdir(directory) if directory.exists() else []:
        writer = _LEFTOVER.fullmatch(name)
        if writer and _is_dead(directory / name, writer["host"], int(writer["pid"])):
            shutil.rmtree(directory / name, ignore_errors=True)  # a folder of another user may stay; it does no harm


def _is_dead(leftover: Path, host: str, pid: int) -> bool:
    try:
        if host != _host():
            return time.time() - leftover.stat().st_mtime > _SECONDS_KEPT
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, FileNotFoundError):  # the process is another user's, or has just finished
        pass
    return False


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """Let system errors name the file that was to be written, also those that safetensors reports as text."""
    try:
        yield
    except OSError as error:  # it names a temporary file, or none, as when the disk is full
        if error.errno is None or error.filename == str(path):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def write_json(path: Path, content: dict[str, Any], replace: bool = True) -> None:
    """Write JSON as :func:`write_atomically` does."""
    write_atomically(path, lambda temporary: temporary.write_text(json_text(content)), replace)


def json_text(content: dict[str, Any]) -> str:
    """JSON as :func:`write_json` writes it."""
    return json.dumps(content, indent=2) + "\n"


def read_json(path: Path, schema: Schema) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedFileError: if the content does not fit the schema. The error names the field.
        OSError: if it cannot be read.
    """
    _require_file(path)
    with path.open("rb") as file:
        content = file.read(_MAX_JSON_BYTES + 1)
    try:
        if len(content) > _MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {_MAX_JSON_BYTES} bytes")
        return parse_json(content, schema)
    except ValueError as error:
        raise altered(path, str(error)) from error


def _require_file(path: Path) -> None:
    """Refuse anything but a regular file. Opening a pipe, for example, would wait."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise DamagedFileError(path, f"is {kind_of(mode)}, not a file")


def save_tensors(path: Path, tensors: dict[str, Tensor], replace: bool = True, **metadata: Any) -> str:
    """Write a safetensors file as :func:`write_atomically` does, with a checksum and metadata in JSON's types.

    Returns:
        The checksum of the tensors, which the file has as ``"sha256"``.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = tensor_digest(tensors)
    content = with_checksum({"sha256": digest, **metadata})
    # One entry, since safetensors writes several entries in any order. Equal content should give equal files.
    header = {"lightning_trak": json.dumps(content)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, header), replace)
    return digest


def load_tensors(path: Path, verify: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of :func:`save_tensors`. The tensors are memory-mapped.

    Args:
        path: the file.
        verify: whether to compare the checksum with the tensors.

    Returns:
        The tensors, and the metadata with ``"sha256"``.

    Raises:
        DamagedFileError: if the file is truncated or altered. The error says what is wrong.
        OSError: if it cannot be read.
    """
    with open_safetensors(path) as file:
        metadata = _header(path, file)
        tensors = all_tensors(file)
    if verify and metadata["sha256"] != tensor_digest(tensors):
        raise altered(path, "its checksum does not match its content")
    return tensors, metadata


def load_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file of :func:`save_tensors`.

    Raises:
        DamagedFileError: if the file is truncated or altered. The error says what is wrong.
        OSError: if it cannot be read.
    """
    with open_safetensors(path) as file:
        return _header(path, file)


def _header(path: Path, file: Any) -> dict[str, Any]:
    entries = file.metadata() or {}
    if "lightning_trak" not in entries:
        raise altered(path, "its header lacks the checksum")
    try:
        metadata: dict[str, Any] = parse_json(entries["lightning_trak"].encode(), _HEADER)
    except ValueError as error:
        raise altered(path, f"in its header, {error}") from error
    return metadata


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open any safetensors file.

    Raises:
        DamagedFileError: if the file is truncated, or is not a safetensors file.
        OSError: if it cannot be read. The error names the file.
    """
    _require_file(path)
    with path.open("rb"):  # without read permission, safetensors would report "no such file"
        pass
    try:
        with _os_errors(path), safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise altered(path, str(error)) from error
    except OSError as error:
        if error.filename:
            raise
        raise OSError(f'"{path}" cannot be read: {error}') from error


def all_tensors(file: Any) -> dict[str, Tensor]:
    """The tensors of an open safetensors file, by name."""
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping


def tensor_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
