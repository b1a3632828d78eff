"""Checks of paths from the user, before anything is written."""

import os
import re
import stat
from pathlib import Path


def local_path(path: str | os.PathLike[str], what: str) -> Path:
    """A path on a disk, with ``~`` as the home directory.

    Args:
        path: the path from the user.
        what: what the path is for, such as ``"store"``, in messages.

    Raises:
        TypeError: if it is no path.
        ValueError: if the path is empty or a URL, or if the user in ``~user`` is unknown.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"expected the path of a {what}, got a {type(path).__name__}")
    if not os.fspath(path) or "\0" in str(path):
        raise ValueError(f'expected the path of a {what}, got {str(path)!r}; "." is the working directory')
    # A Path turns "s3://bucket" into "s3:/bucket". A drive such as "C:/" has one letter.
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", str(path))
    if scheme or "://" in str(path):
        local = scheme is not None and scheme[1].lower() in ("file", "local")
        advice = "mount the bucket and give the path of the mount, or use a local path and copy the files later"
        if local:
            advice = "give the path alone, without the scheme"
        raise ValueError(f'a {what} must be on a disk, local or mounted, got "{path}"; {advice}')
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f'the {what} "{path}" is in the home directory of an unknown user; give the path') from error


def local_file(path: str | os.PathLike[str], what: str) -> Path:
    """A path on a disk where a file can be, but no directory is. Call this before the work that the file is for.

    Args:
        path: the path from the user.
        what: what the path is for, such as ``"file of scores"``, in messages.

    Raises:
        ValueError: as :func:`local_path`.
        IsADirectoryError: if there is a directory.
        NotADirectoryError: if its folder, or one of that folder's parents, exists and is not a directory.
    """
    file = local_path(path, what)
    local_directory(file.parent, what)
    if file.is_dir():
        raise IsADirectoryError(f'"{file}" is a directory, and a {what} would take its place; use another path')
    return file


def local_directory(path: str | os.PathLike[str], what: str) -> Path:
    """A directory on a disk that exists or can be made: an absolute path, as the working directory may change later.

    Args:
        path: the path from the user.
        what: what the path is for, such as ``"store"``, in messages.

    Raises:
        ValueError: as :func:`local_path`.
        NotADirectoryError: if the path, or one of its parents, exists and is not a directory.
    """
    directory = local_path(path, what).absolute()
    for part in (directory, *directory.parents):
        try:
            mode = part.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            if part.is_symlink():
                raise NotADirectoryError(
                    f'"{part}" is a link to "{os.readlink(part)}", which does not exist, so it cannot hold a {what};'
                    " make that directory, or remove the link"
                ) from None
            continue
        if not stat.S_ISDIR(mode):
            raise NotADirectoryError(
                f'"{part}" is {kind_of(mode)}, not a directory, so it cannot hold a {what}; use another path'
            )
        break
    return directory


def kind_of(mode: int) -> str:
    """The kind of a file, by its mode, in words."""
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")
