"""Files that a user names. If one is missing or cannot be read, the error says what to do."""

import os
from pathlib import Path

from safetensors import SafetensorError

from lightning_trak.storage.files import DamagedFileError, remove_leftovers
from lightning_trak.storage.paths import local_file, local_path


def existing_path(path: str | Path, advice: str) -> Path:
    """A path on a disk that must exist.

    Args:
        path: the path from the user.
        advice: what to do if there is no such file, for the error.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the path is a URL.
    """
    path = local_path(path, "file")
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f'there is no file "{path}"; {advice}') from error
    return path


def new_file(path: str | os.PathLike[str], what: str = "file") -> Path:
    """The path of a file that is now to be written. What killed processes have left in its folder is removed.

    Args:
        path: the path from the user.
        what: what the path is for, in messages.

    Raises:
        ValueError: if the path is a URL.
        IsADirectoryError: if there is a directory.
    """
    file = local_file(path, what)
    remove_leftovers(file.parent)
    return file


def unreadable(error: DamagedFileError, advice: str) -> ValueError:
    """The error for a file of the user that is damaged or of another kind.

    Args:
        error: the error from reading the file.
        advice: what to do, for the error.
    """
    if isinstance(error.__cause__, SafetensorError):
        return ValueError(f'"{error.path}" is truncated or not a safetensors file: {error.__cause__}; {advice}')
    return ValueError(f"{error}; {advice}")
