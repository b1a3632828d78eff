"""Deletes what a run has left in a directory: files that this package wrote, and nothing else."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_trak.storage.locks import Lock

_SECONDS = 5.0  # processes of one run stop reading at slightly different times


def discard(directory: Path, folders: Sequence[str], patterns: Sequence[str], own: Callable[[str], bool]) -> None:
    """Delete files. Folders that are empty then are removed, too.

    Args:
        directory: the directory.
        folders: patterns of the folders in it that this package writes files to.
        patterns: regular expressions of the paths in it of the files that this package writes.
        own: whether to keep a file, given its path.
    """
    found = [path for folder in folders for path in directory.glob(folder) if path.is_dir() and not path.is_symlink()]
    for path in [*directory.iterdir(), *(path for folder in found for path in folder.iterdir())]:
        name = path.relative_to(directory).as_posix()
        if any(re.fullmatch(pattern, name) for pattern in patterns) and not path.is_dir() and not own(name):
            path.unlink(missing_ok=True)
    for folder in found:
        if not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def without_readers(lock: Lock | None) -> Iterator[bool]:
    """Keep processes from reading for a moment.

    Args:
        lock: the lock that readers share; None: this kind of directory has none.

    Yields:
        Whether no other process is reading.
    """
    if lock is None:
        yield True
        return
    deadline = time.monotonic() + _SECONDS
    while not (alone := lock.take(wait=False)) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        yield alone
    finally:
        lock.take(shared=True)
