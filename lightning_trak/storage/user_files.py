"""Files that a user names. If one is missing or cannot be read, the error says what to do."""

from pathlib import Path

from safetensors import SafetensorError

from lightning_trak.storage.files import DamagedFileError
from lightning_trak.storage.paths import local_path


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


def unreadable(error: DamagedFileError, advice: str) -> ValueError:
    """The error for a file of the user that is damaged or of another kind.

    Args:
        error: the error from reading the file.
        advice: what to do, for the error.
    """
    if isinstance(error.__cause__, SafetensorError):
        return ValueError(f'"{error.path}" is truncated or not a safetensors file: {error.__cause__}; {advice}')
    return ValueError(f"{error}; {advice}")
