"""What a store keeps besides shards: extras of checkpoints, the first examples, and the engine.

Every file states in its header what it is, and has a checksum. An extra that was altered is made again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lightning_trak.features.store.schemas import ENGINE, HEADER
from lightning_trak.storage import schemas
from lightning_trak.storage.files import (
    DamagedFileError,
    altered,
    load_metadata,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)


class StoredExtras:
    """The files of a store other than its manifest and its shards.

    Attributes:
        directory: the store.
        key: a digest of what the store is of.
        checkpoints: the keys of the run's checkpoints.
    """

    directory: Path
    key: str
    checkpoints: list[str]

    # Files whose checksum was verified, by path, size and time of change. Once per process is enough.
    _verified: ClassVar[set[tuple[Path, int, int]]] = set()

    def folder(self, checkpoint: int) -> Path:
        """The folder of a checkpoint."""
        return self.directory / f"checkpoint-{self.checkpoints[checkpoint][:16]}"

    def _path(self, checkpoint: int, name: str) -> Path:
        return self.folder(checkpoint) / f"{name}.safetensors"

    def write_extra(self, checkpoint: int, name: str, tensors: dict[str, Tensor], key: str) -> None:
        """Write tensors that belong to a checkpoint as a whole. ``key`` identifies what they were made from."""
        save_tensors(self._path(checkpoint, name), tensors, **self._about(checkpoint, name, key))

    def _about(self, checkpoint: int, name: str, key: str) -> dict[str, Any]:
        """What the header of a file says of it, see :func:`require_place`."""
        return {"checkpoint": self.checkpoints[checkpoint], "name": name, "key": key}

    def settle_extra(self, checkpoint: int, name: str, tensors: dict[str, Tensor], key: str) -> None:
        """Write an extra as :meth:`write_extra` does, unless another process was faster. Read it before you use it.

        Processes that make it from the same data may round differently, and all must use the same one.
        """
        try:
            save_tensors(self._path(checkpoint, name), tensors, False, **self._about(checkpoint, name, key))
        except FileExistsError:
            if self.read_extra(checkpoint, name, key) is None:  # it is damaged
                self.write_extra(checkpoint, name, tensors, key)

    def remove_extra(self, name: str) -> None:
        """Remove an extra of all checkpoints, because it must be made again."""
        for path in self.directory.glob(f"checkpoint-*/{name}.safetensors"):
            path.unlink(missing_ok=True)

    def read_extra(self, checkpoint: int, name: str, key: str) -> dict[str, Tensor] | None:
        """Read tensors that :meth:`write_extra` wrote.

        Returns:
            The tensors. None if nothing was written with this ``key``. A damaged file gives a warning and None, because
            an extra can be made again.
        """
        return self._read_extra(self._path(checkpoint, name), self.checkpoints[checkpoint], key)

    def write_examples(self, tensors: dict[str, Tensor]) -> None:
        """Write the first examples, which all checkpoints share."""
        save_tensors(self._examples, tensors, checkpoint="", name=self._examples.stem, key=self.key)

    def read_examples(self) -> dict[str, Tensor] | None:
        """What :meth:`write_examples` wrote, as :meth:`read_extra` reads."""
        return self._read_extra(self._examples, "", self.key)

    @property
    def _examples(self) -> Path:
        return self.directory / "examples.safetensors"

    def _read_extra(self, path: Path, checkpoint: str, key: str) -> dict[str, Tensor] | None:
        if not path.exists():
            return None
        try:
            metadata = load_metadata(path)
            if metadata.get("key") != key:
                return None
            require_place(path, metadata, checkpoint, key)
            return self._load(path)[0]
        except DamagedFileError as error:
            warnings.warn(f"{error}, so it counts as lost", stacklevel=2)
            return None

    def settle_engine(self, engine: str | None = None) -> str | None:
        """Settle the engine of all runs on this store. The first run that names an engine decides.

        Args:
            engine: this process's choice; None if it has none.

        Returns:
            The engine of the store; None if none is chosen yet.

        Raises:
            ValueError: if the engine file is damaged.
        """
        if engine is not None:
            with suppress(FileExistsError):  # another run or process was faster
                write_json(self._engine_path, {"engine": engine, "refuted": {}}, replace=False)
        found: str | None = self._engines()["engine"]
        return found

    def refute_engine(self, engine: str, reason: str, successor: str) -> None:
        """Note that an engine gets gradients of this model wrong. Its shards count as missing from now on.

        Args:
            engine: the engine that is wrong.
            reason: what it got wrong.
            successor: the engine that computes gradients from now on.
        """
        write_json(self._engine_path, {"engine": successor, "refuted": self.refuted_engines() | {engine: reason}})

    def refuted_engines(self) -> dict[str, str]:
        """The engines that get gradients of this model wrong, by name, each with what it got wrong."""
        refuted: dict[str, str] = self._engines()["refuted"]
        return refuted

    @property
    def _engine_path(self) -> Path:
        return self.directory / f"engine-{self.key[:16]}.json"

    def _engines(self) -> dict[str, Any]:
        if not self._engine_path.exists():
            return {"engine": None, "refuted": {}}
        with advice():
            found: dict[str, Any] = read_json(self._engine_path, ENGINE)
        return found

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        status = path.stat()
        seen = (path.resolve(), status.st_size, status.st_mtime_ns)
        loaded = load_tensors(path, verify=seen not in self._verified)
        self._verified.add(seen)
        return loaded


@contextmanager
def advice() -> Iterator[None]:
    """Say what to do about a damaged file."""
    try:
        yield
    except DamagedFileError as error:
        raise ValueError(f"{error}; delete it and call featurize again") from error


def require_place(path: Path, metadata: dict[str, Any], checkpoint: str, key: str, **others: schemas.Schema) -> None:
    """Check that a file is what its name says, and was not moved or copied from elsewhere."""
    try:
        schemas.record({**HEADER, **others})("its header", metadata)
    except ValueError as error:
        raise altered(path, str(error)) from error
    found, wanted = (metadata["checkpoint"], metadata["name"], metadata["key"]), (checkpoint, path.stem, key)
    if found != wanted:
        store = "this store" if found[2] == key else "another store"
        raise DamagedFileError(path, f"holds {found[1]} of checkpoint {found[0][:16]} of {store}")
