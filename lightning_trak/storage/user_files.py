"""Files that a user names: they are there and can be read, or the error says what to do."""

from pathlib import Path

from safetensors import SafetensorError

from lightning_trak.storage.files import DamagedFileError
from lightning_trak.storage.paths import local_path


def existing_path(path: str | Path, advice: str) -> Path:
    """The path of something on a disk that must exist.

    Args:
        path: what the user gave.
        advice: what to do if nothing is there, for the error.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it is a URL.
    """
    path = local_path(path, "file")
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f'there is no file "{path}"; {advice}') from error
    return path


def unreadable(error: DamagedFileError, advice: str) -> ValueError:
    """The error that a file of the user is damaged or of another kind.

    Args:
        error: what reading it raised.
        advice: what to do about it.
    """
    if isinstance(error.__cause__, SafetensorError):
        return ValueError(f'"{error.path}" is truncated or not a safetensors file: {error.__cause__}; {advice}')
    return ValueError(f"{error}; {advice}")
