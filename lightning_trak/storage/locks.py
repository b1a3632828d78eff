"""Locks between processes. When a process dies, the kernel releases its locks."""

import errno
import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path

_NOT_FOR_WRITING = (errno.EACCES, errno.EISDIR, errno.EPERM, errno.EROFS)


class Lock:
    """A lock on a file or directory, exclusive or shared.

    The lock belongs to the file, also after the file is renamed. It ends with :meth:`close`, with this object, or with
    the process. Two objects exclude each other, in one process or in two. Processes that were forked from this one,
    such as the workers of a DataLoader, hold the lock, too, until this process releases it or they end.

    Args:
        path: an existing file or directory. The lock of a directory works between processes of one machine; on NFS,
            other machines do not see it.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR)  # NFS needs a file that is open for writing
        except OSError as error:
            if error.errno not in _NOT_FOR_WRITING:
                raise
            descriptor = os.open(path, os.O_RDONLY)
        self._descriptor = descriptor
        self._closing = weakref.finalize(self, _close, descriptor, os.getpid())

    @property
    def file(self) -> tuple[int, int]:
        """An identifier of the file. No other file has the same one while this object is open."""
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino

    def take(self, *, shared: bool = False, wait: bool = True) -> bool:
        """Take the lock. It replaces the lock that this object already holds.

        Args:
            shared: whether others may share it.
            wait: whether to wait until others release it.

        Returns:
            Whether the lock was taken. If it was not, this object holds no lock.

        Raises:
            OSError: if the file system has no locks.
        """
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # on some systems, the old lock is kept if the change fails
            return False
        return True

    def is_on(self, path: Path) -> bool:
        """Whether the locked file is still the file at a path."""
        try:
            mine, there, folder = os.fstat(self._descriptor), os.stat(path), os.stat(path.parent)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            raise
        # On NFS, a path may still lead to a file that was just replaced. Its count of names is then zero.
        nameless = mine.st_nlink == 0 and folder.st_nlink > 0  # some file systems always have zero
        return os.path.samestat(mine, there) and not nameless

    def close(self) -> None:
        """Release the lock."""
        self._closing()


def hold(directory: Path, name: str, what: str) -> Lock | None:
    """Make a directory if there is none, and lock it for the one run that writes to it.

    Args:
        directory: the directory.
        name: its name in errors.
        what: what it is for, such as ``"snapshots"``, in errors.

    Returns:
        The lock; None if the file system has no locks.

    Raises:
        NotADirectoryError: if there is a file in its place.
        ValueError: if another run holds the lock.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(f'"{name}" is a file; use another directory for {what}') from error
    lock = Lock(directory)
    try:
        alone = lock.take(wait=False)
    except OSError:  # no locks here
        lock.close()
        return None
    if not alone:
        lock.close()
        raise ValueError(f'another run is writing to "{name}"; use another directory, or wait until that run has ended')
    return lock


def _close(descriptor: int, owner: int) -> None:
    if os.getpid() == owner:
        # After close alone, forked processes would still hold the lock. They must not release the lock of this process.
        with suppress(OSError):  # no locks here
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
