"""Locks between processes, which the kernel takes from a process that dies."""

import errno
import fcntl
import os
import weakref
from contextlib import suppress
from pathlib import Path

_NOT_FOR_WRITING = (errno.EACCES, errno.EISDIR, errno.EPERM, errno.EROFS)


class Lock:
    """A lock on a file or directory: of one holder alone, or shared by several.

    It belongs to the file, whatever the file is called later. It ends with :meth:`close`, with this object, or with the
    process. A second object excludes this one in the same process as in another. Processes that were forked from this
    one, such as the workers of a DataLoader, hold the lock as well, until this one lets it go or they end.

    Args:
        path: of a file or directory that exists. A directory's lock keeps processes of one machine apart; on NFS, those
            of other machines do not see it.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            descriptor = os.open(path, os.O_RDWR)  # NFS wants a file that is open for writing
        except OSError as error:
            if error.errno not in _NOT_FOR_WRITING:
                raise
            descriptor = os.open(path, os.O_RDONLY)
        self._descriptor = descriptor
        self._closing = weakref.finalize(self, _close, descriptor, os.getpid())

    @property
    def file(self) -> tuple[int, int]:
        """What stands for the file: no other has the same while this object is open."""
        status = os.fstat(self._descriptor)
        return status.st_dev, status.st_ino

    def take(self, *, shared: bool = False, wait: bool = True) -> bool:
        """Take the lock, in place of what this object holds of it already.

        Args:
            shared: whether others may share it.
            wait: whether to wait for others who hold it.

        Returns:
            Whether it was taken. If it was not, this object holds nothing.

        Raises:
            OSError: if the file system has no locks.
        """
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # systems differ in whether a failed change keeps the old lock
            return False
        return True

    def is_on(self, path: Path) -> bool:
        """Whether the file is still the one at a path."""
        try:
            mine, there, folder = os.fstat(self._descriptor), os.stat(path), os.stat(path.parent)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            raise
        # On NFS, a path may lead to a file that was there a moment ago; that this has no name left is known at once.
        nameless = mine.st_nlink == 0 and folder.st_nlink > 0  # some file systems do not count names
        return os.path.samestat(mine, there) and not nameless

    def close(self) -> None:
        """Let the lock go."""
        self._closing()


def _close(descriptor: int, owner: int) -> None:
    if os.getpid() == owner:
        # Closing alone would leave it to processes that were forked since; but they must not take it from this one.
        with suppress(OSError):  # no locks here
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)
