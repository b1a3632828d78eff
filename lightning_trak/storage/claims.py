"""A directory that belongs to one identity. The identity is everything that the files in it depend on.

The identity is in ``manifest.json``. Runs with the same identity share the directory. A run with another identity is
refused, and the error names the first difference. There is one exception: no run that claimed the directory is alive,
and none has left a result. Such runs probably failed because of a mistake that the user has corrected. The directory
then belongs to the new run.

A process that writes to a directory holds a shared lock on the file ``manifest.json``. No process removes this file:

- A new manifest is written elsewhere and locked there. It is moved into place if no file is there. Of several
  processes, only one can do this.
- A process that finds a manifest with the same identity shares the lock on it.
- A process that finds one with another identity tries to get an exclusive lock. If it gets the lock, no run is alive,
  and none can join while the process looks for results. If there are no results, the process replaces the manifest by
  its own, which it has locked. The replacement is one step.
- A process that gets a lock checks whether the file is still the manifest. If it is not, the process begins again.

When a process dies, the kernel releases its locks. If a process is killed at any moment, it leaves no manifest, the old
manifest, or its own. At worst, it also leaves a hidden temporary folder, which the next run removes. The old manifest
is complete, but some files of the failed run may be missing: those that lose their meaning with its identity, such as
notes of failures, are removed before the manifest is replaced. Workers of a DataLoader hold the lock of a killed
process until they see that the process has ended. A process may be killed in the few milliseconds between its lock and
the new manifest. Another process that opens the directory at this moment may be refused. It can be started again.

A directory may grow: a run with the same identity may extend some fields of the manifest, if all results stay valid
under the new one. It replaces the manifest in the same way, when no other run is alive.

A run may overwrite: the files of a run with another identity are deleted, and the manifest is replaced. This also needs
an exclusive lock, on the manifest and on the file that readers share a lock on, so that no other process uses the
directory. A process that is killed on the way leaves fewer files of the old run, and still its manifest. Only files
whose names this package gives are deleted.

If the file system has no locks, the first run keeps the directory, since others cannot know whether it is alive. The
same holds if a user has no permission to lock the manifest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from lightning_trak.checks import require_bool
from lightning_trak.storage.discarding import discard, without_readers
from lightning_trak.storage.files import json_text, remove_leftovers, write_atomically
from lightning_trak.storage.locks import Lock
from lightning_trak.storage.manifests import MANIFEST, DirectoryKind, read_manifest
from lightning_trak.storage.paths import local_directory
from lightning_trak.storage.schemas import are_same, as_json, json_digest, parse_json, with_checksum

# The locks of this process, by process id and file. Runs of one process share a lock, and the newest may replace it.
_held: WeakValueDictionary[tuple[int, int, int], Lock] = WeakValueDictionary()


class ClaimedDirectory:
    """A directory that belongs to one identity, see the docstring of this module.

    Args:
        directory: a local or mounted directory. It is made on first use.
        kind: the kind of directory.
        content: the manifest of a new directory in JSON's types, without format and checksum. ``"identity"`` holds what
            the files in the directory depend on. An existing directory must have the same values in all these fields.
        difference: given a field's name and the values of the manifest and of this run, returns two texts: what the
            manifest has, and what this run has.
        user: the name of this run in errors, such as ``"one"`` in "this one has ...".
        read_only: the directory must exist, and it is not changed. Other runs may claim it in the meantime.
        extend: given the manifest of an existing directory with the same identity and the content of this run, returns
            the content that this run goes on with. It may differ from the manifest in the fields that grow, and all
            results must be valid under it. None: the run cannot go on with this directory.
        overwrite: whether to delete what another run has left.
        own: if a run with the same identity overwrites: whether a file, given its path in the directory, is its own.
            Others are deleted, unless another process uses the directory.

    Attributes:
        path: the directory.
        manifest: the content of the manifest.
        key: a digest of the identity.

    Raises:
        FileNotFoundError: if ``read_only`` is true and there is no such directory.
        NotADirectoryError: if there is something else in the place of the directory.
        ValueError: if the directory has another identity (the error names the first difference), its manifest is
            damaged, or it has results but no manifest.
        OSError: if it cannot be read or written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        kind: DirectoryKind,
        content: dict[str, Any],
        difference: Callable[[str, Any, Any], tuple[str, str]],
        user: str,
        read_only: bool = False,
        extend: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any] | None] | None = None,
        overwrite: bool = False,
        own: Callable[[str], bool] = lambda _: True,
    ) -> None:
        require_bool("overwrite", overwrite)
        self.path = local_directory(directory, kind.short_name)
        self._kind, self._difference, self._user, self._extend = kind, difference, user, extend
        self._lock: Lock | None = None
        self._overwrite, self._own = overwrite, own
        content = as_json(content)
        if read_only:
            self._lock = self._readers_lock(shared=True)
            self.manifest = read_manifest(directory, kind)
            wanted = self._extended(content)
            if wanted is content:
                self._require_same(content)
            self.manifest |= {field: wanted[field] for field in kind.growing}
        else:
            for folder in (self.path, *(found for pattern in kind.folders for found in self.path.glob(pattern))):
                remove_leftovers(folder)
            while not self._claim(content):
                pass
            if kind.readers is not None and not (self.path / kind.readers).exists():
                (self.path / kind.readers).touch()
        self.key = json_digest(self.manifest["identity"])

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_lock": None, "_extend": None, "_own": None}  # a copy holds no lock, and claims nothing

    def release(self) -> None:
        """Let others take the directory. Files can still be read."""
        self._lock = None  # other runs of this process may share it

    def require_unchanged(self) -> None:
        """Check that the directory still belongs to this run. Call it before a file is written.

        Raises:
            RuntimeError: if a later run of this process has claimed the directory, or if the manifest was changed.
        """
        if read_manifest(self.path, self._kind) != self.manifest:
            raise RuntimeError(
                f'another run has taken {self._kind.short_name} "{self.path}" over; give each run a directory'
            )

    def _claim(self, content: dict[str, Any]) -> bool:
        """Make a manifest, join the runs of the existing manifest, or replace it.

        Returns:
            False if another process has changed the directory in the meantime. Then try again.
        """
        path = self.path / MANIFEST
        if not os.path.lexists(path):
            return self._create(content)
        self.manifest = read_manifest(self.path, self._kind)
        wanted = self._extended(content)
        try:
            opened = Lock(path)
            lock = _held.get(_key(opened), opened)
            if lock is not opened and self._is_same(wanted):
                self._lock = lock
                return True
            alone = lock.take(wait=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            self._claim_without_locks(wanted, content, error)
            return True
        try:
            return self._claim_locked(lock, alone, content)
        finally:
            if lock is not opened:
                lock.take(shared=True)  # earlier runs of this process need it
            if self._lock is not opened:
                opened.close()

    def _claim_locked(self, lock: Lock, alone: bool, content: dict[str, Any]) -> bool:
        """See :meth:`_claim`.

        Args:
            lock: on the manifest.
            alone: whether this process has it for itself.
            content: as for :meth:`_claim`.
        """
        path = self.path / MANIFEST
        if not alone and not lock.take(shared=True, wait=False):
            lock.take(shared=True)  # wait: the process that has it will replace the manifest or release the lock
            return False
        if not lock.is_on(path):
            return False
        self.manifest = read_manifest(self.path, self._kind)
        wanted = self._extended(content)
        same, grows = self._is_same(wanted), self._grows(wanted, content)
        discarded = self._overwrite and not grows and self._discard(alone, same)
        if not same and (discarded or (alone and not self._has_results())):
            self._replace(content)
            return True
        if grows and alone:
            self._write(wanted, replace=True)
            return True
        if grows:
            raise ValueError(
                f'another process is writing to {self._kind.short_name} "{self.path}", so that it cannot grow now;'
                " wait until that process has ended"
            )
        if alone:
            lock.take(shared=True)
            if not lock.is_on(path):
                return False
        self._require_same(wanted)
        self._lock = lock
        _held[_key(lock)] = lock
        return True

    def _claim_without_locks(self, wanted: dict[str, Any], content: dict[str, Any], error: OSError) -> None:
        """See :meth:`_claim`. At worst, two runs add different data, and one of them is refused when it writes."""
        if self._grows(wanted, content):
            self._write(wanted, replace=True)
        elif self._overwrite and not self._is_same(wanted):
            raise ValueError(
                f'{self._kind.short_name} "{self.path}" cannot be overwritten: its file system has no locks, so'
                " nobody can tell whether another process uses it; delete it yourself, or use another directory"
            ) from error
        else:
            self._require_same(wanted)

    def _discard(self, alone: bool, same: bool) -> bool:
        """Delete what other runs have left; of a run with the same identity, what is not this run's own.

        Returns:
            Whether that was possible.
        """
        if same and not alone:
            return False
        with without_readers(self._readers_lock() if alone else None) as unread:
            if alone and unread:
                discard(self.path, self._kind.folders, self._kind.files, self._own if same else lambda _: False)
            elif not same and self._has_results():
                raise ValueError(
                    f'{self._kind.short_name} "{self.path}" cannot be overwritten: another process uses it; wait'
                    " until that process has ended, or use another directory"
                )
        return alone and unread

    def _readers_lock(self, shared: bool = False) -> Lock | None:
        """The lock that readers share; None if there is none here."""
        if self._kind.readers is None:
            return None
        try:
            opened = Lock(self.path / self._kind.readers)
            lock = _held.get(_key(opened), opened)
            if lock is not opened:
                opened.close()
            elif shared:
                lock.take(shared=True)  # wait: another process may be deleting files
        except OSError:  # no locks here, or no file
            return None
        _held[_key(lock)] = lock
        return lock

    def _create(self, content: dict[str, Any]) -> bool:
        if self._has_results():
            if os.path.lexists(self.path / MANIFEST):  # another process has just made it, and a result
                return False
            raise ValueError(f'"{self.path}" holds {self._kind.results_name} but no {MANIFEST}; use another directory')
        try:
            self._write(content, replace=False)
        except FileExistsError:
            return False
        return True

    def _replace(self, content: dict[str, Any]) -> None:
        for pattern in self._kind.remains:
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        self._write(content, replace=True)

    def _write(self, content: dict[str, Any], replace: bool) -> None:
        text = json_text(with_checksum({"format": self._kind.version, **content}))
        manifest = parse_json(text.encode(), self._kind.schema)  # nothing is written that could not be read again
        lock: Lock | None = None

        def write(temporary: Path) -> None:
            nonlocal lock
            temporary.write_text(text)
            try:
                lock = Lock(temporary)
                lock.take(shared=True)
            except OSError:  # no locks here
                lock = None

        write_atomically(self.path / MANIFEST, write, replace)
        self.manifest, self._lock = manifest, lock
        if lock is not None:
            _held[_key(lock)] = lock

    def _has_results(self) -> bool:
        return any(self.path.glob(self._kind.results))

    def _compared(self, content: dict[str, Any]) -> dict[str, Any]:
        apart = ("format", "checksum", "identity", *self._kind.settled)
        identity: dict[str, Any] = content["identity"]
        return identity | {field: value for field, value in content.items() if field not in apart}

    def _differing(self, content: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """Fields in which this run differs from the manifest: name, value of the manifest, value of this run."""
        stored, wanted = self._compared(self.manifest), self._compared(content)
        fields = [(field, stored.get(field), mine) for field, mine in wanted.items()]
        return [(field, theirs, mine) for field, theirs, mine in fields if not are_same(theirs, mine)]

    def _extended(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content that this run goes on with in the existing directory; the same object if it cannot."""
        others = [field for field, *_ in self._differing(content) if field not in self._kind.growing]
        found = None if self._extend is None or others else self._extend(self.manifest, content)
        if found is None:
            return content
        return as_json(found | {field: self.manifest[field] for field in self._kind.settled})  # type: ignore[no-any-return]

    def _grows(self, wanted: dict[str, Any], content: dict[str, Any]) -> bool:
        """Whether the directory has to grow for what :meth:`_extended` gave for some content."""
        return wanted is not content and not self._is_same(wanted)

    def _is_same(self, content: dict[str, Any]) -> bool:
        return not self._differing(content)

    def _require_same(self, content: dict[str, Any]) -> None:
        differing = self._differing(content)
        if not differing:
            return
        field, theirs, mine = differing[0]
        made, have = self._difference(field, theirs, mine)
        raise ValueError(
            f'{self._kind.short_name} "{self.path}" was made with {made}, this {self._user} has {have}; use another'
            f" directory or the same {field}, or overwrite=True, which deletes this {self._kind.short_name}"
        )


def _key(lock: Lock) -> tuple[int, int, int]:
    return os.getpid(), *lock.file
