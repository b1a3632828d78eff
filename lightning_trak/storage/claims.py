"""A directory that belongs to one identity: to everything that the files in it depend on.

The identity is in ``manifest.json``. Runs of the same identity share the directory. A run of another identity is
refused, naming the first difference; unless no run that has claimed the directory is alive, and none has left a result:
such runs have failed over a mistake that has been mended since, and the directory is the new run's.

Who has a directory open to write in it holds a shared lock on the file ``manifest.json``. Nobody removes that file:

- A new manifest is written elsewhere, locked there, and moved into place if no file is there. Of several processes, one
  can do that.
- A process that finds a manifest of the same identity shares the lock on it.
- A process that finds one of another identity tries to lock it alone. If it can, no run is alive, and none can join
  while it looks for results. If there are none, it replaces the manifest, in one step, by its own, which it has locked.
- Whoever gets a lock looks whether the file is still the manifest; if not, it begins again.

The kernel takes locks from a process that dies, so that one that is killed at any moment leaves no manifest, the one
that was there, or its own, and at worst a hidden temporary folder, which the next run removes. What was there is
whole: the files of a failed run that are removed with its claim, such as notes of failures, go before the manifest is
replaced. Workers of a DataLoader hold the lock of a killed process until they see that it is gone. If a process is
killed in the few milliseconds between its lock and the new manifest, another that opens the directory just then may be
refused; it can be started again.

Where the file system has no locks, the first run keeps the directory, since nobody can know whether it is alive. So it
does towards a user who may not lock its manifest.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from lightning_trak.storage.files import DamagedFileError, json_text, read_json, remove_leftovers, write_atomically
from lightning_trak.storage.locks import Lock
from lightning_trak.storage.paths import local_directory
from lightning_trak.storage.schemas import Schema, anything, are_same, as_json, parse_json, record, with_checksum

MANIFEST = "manifest.json"

# The locks of this process, by its id and the file: runs of one process share a lock, and the newest may replace it.
_held: WeakValueDictionary[tuple[int, int, int], Lock] = WeakValueDictionary()


@dataclass(frozen=True)
class DirectoryKind:
    """What all directories of a kind have in common.

    Attributes:
        name: what one is called where there is none, such as ``"feature store"``.
        short_name: what one is called in other messages, such as ``"store"``.
        version: the ``"format"`` in its manifest that this version reads.
        schema: what the manifest must be like, sealed by a checksum. A function of a module can be pickled.
        advice: what to do if there is none, such as ``"call featurize first"``.
        folders: patterns of the folders in it that files are written to.
        results: pattern of the files that runs are for: a directory that has one stays with its identity.
        results_name: what these are called in messages, such as ``"shards"``.
        remains: patterns of other files that lose their meaning with the identity.
        settled: fields of the manifest that need not be those that a run asks for: the first run decides on them.
    """

    name: str
    short_name: str
    version: int
    schema: Schema
    advice: str
    folders: tuple[str, ...]
    results: str
    results_name: str
    remains: tuple[str, ...] = ()
    settled: tuple[str, ...] = ()


class ClaimedDirectory:
    """A directory that belongs to one identity, see above.

    Args:
        directory: local or mounted; made on first use.
        kind: what kind of directory it is.
        content: the manifest of a new one, as JSON-able values, without format and checksum. ``"identity"`` has what
            the files in it depend on; one that exists must have been made with the same values in all these fields.
        difference: says in words what of a field the manifest has, and what of it this run has, given the field's name
            and the two values.
        user: what to call this run in errors, such as ``"one"``: "this one has ...".
        read_only: it must exist, and is not changed; other runs may claim it meanwhile.

    Attributes:
        path: the directory.
        manifest: its content.
        key: stands for the identity.

    Raises:
        FileNotFoundError: if it is to be read only and there is none.
        NotADirectoryError: if something else is in the directory's place.
        ValueError: if the directory is of another identity, naming the first difference; its manifest is damaged; or it
            has results but no manifest.
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
    ) -> None:
        self.path = local_directory(directory, kind.short_name)
        self._kind, self._difference, self._user = kind, difference, user
        self._lock: Lock | None = None
        content = as_json(content)
        if read_only:
            self.manifest = read_manifest(directory, kind)
            self._require_same(content)
        else:
            for folder in (self.path, *(found for pattern in kind.folders for found in self.path.glob(pattern))):
                remove_leftovers(folder)
            while not self._claim(content):
                pass
        self.key = hashlib.sha256(json.dumps(self.manifest["identity"], sort_keys=True).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_lock": None}  # a copy, here or in another process, is not what keeps others out

    def require_unchanged(self) -> None:
        """Check that the directory still belongs to this run, before something is written to it.

        Raises:
            RuntimeError: if a later run of this process has claimed it, or somebody has changed the manifest.
        """
        if read_manifest(self.path, self._kind) != self.manifest:
            raise RuntimeError(
                f'another run has taken {self._kind.short_name} "{self.path}" over; give each run a directory'
            )

    def _claim(self, content: dict[str, Any]) -> bool:
        """Make a manifest, join the runs of the one that is there, or replace it.

        Returns:
            False if another process has changed what is there meanwhile.
        """
        path = self.path / MANIFEST
        if not os.path.lexists(path):
            return self._create(content)
        self.manifest = read_manifest(self.path, self._kind)
        try:
            opened = Lock(path)
            lock = _held.get(_key(opened), opened)
            if lock is not opened and self._is_same(content):
                self._lock = lock
                return True
            alone = lock.take(wait=False)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):
                return False
            self._require_same(content)  # no locks here
            return True
        try:
            if not alone and not lock.take(shared=True, wait=False):
                lock.take(shared=True)  # another process has it alone, and is about to replace it or to let it go
                return False
            if not lock.is_on(path):
                return False
            self.manifest = read_manifest(self.path, self._kind)
            if alone and not self._is_same(content) and not self._has_results():
                self._replace(content)
                return True
            if alone:
                lock.take(shared=True)
                if not lock.is_on(path):
                    return False
            self._require_same(content)
            self._lock = lock
            _held[_key(lock)] = lock
            return True
        finally:
            if lock is not opened:
                lock.take(shared=True)  # it belongs to earlier runs of this process
            if self._lock is not opened:
                opened.close()

    def _create(self, content: dict[str, Any]) -> bool:
        if self._has_results():
            if os.path.lexists(self.path / MANIFEST):  # another process has made it, and a result, meanwhile
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
        manifest = parse_json(text.encode(), self._kind.schema)  # what could not be read again is not written
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
        return {field: value for field, value in content.items() if field not in apart} | identity

    def _differing(self, content: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """Fields in which this run differs from the manifest, each with what that has and what this run has."""
        stored, wanted = self._compared(self.manifest), self._compared(content)
        fields = [(field, stored.get(field), mine) for field, mine in wanted.items()]
        return [(field, theirs, mine) for field, theirs, mine in fields if not are_same(theirs, mine)]

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
            f" directory or the same {field}"
        )


def _key(lock: Lock) -> tuple[int, int, int]:
    return os.getpid(), *lock.file


def read_manifest(directory: str | os.PathLike[str], kind: DirectoryKind) -> dict[str, Any]:
    """The manifest of a directory.

    Args:
        directory: where it is.
        kind: what kind of directory it should be.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not one of this kind, or of another format.
        OSError: if it cannot be read.
    """
    path = local_directory(directory, kind.name) / MANIFEST

    def check(field: str, value: Any) -> None:
        record({"format": anything}, others=anything)(field, value)
        if value["format"] == kind.version:
            kind.schema(field, value)

    try:
        manifest: dict[str, Any] = read_json(path, check)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise ValueError(
                f'"{path}" is a link to "{os.readlink(path)}", which does not exist; restore that file, or use another'
                " directory"
            ) from error
        raise FileNotFoundError(f'"{directory}" is not a {kind.name} yet; {kind.advice}') from error
    except DamagedFileError as error:
        raise ValueError(
            f'"{path}" is not the manifest of a {kind.name}: it {error.reason}; restore it, or use another directory'
        ) from error
    if manifest["format"] != kind.version:
        raise ValueError(
            f'{kind.name} "{directory}" has format {manifest["format"]}; this version reads {kind.version}, so use'
            " another directory"
        )
    return manifest
