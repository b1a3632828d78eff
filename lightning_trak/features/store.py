"""Features on disk: safetensors shards. Each is a fixed range of examples at one checkpoint, written once and whole.

    store/manifest.json                        what all features depend on, and the number of examples in a shard
    store/engine-<key>.json                    the engine that computes gradients: equal bits need equal engines
    store/checkpoint-0002/shard-00017.safetensors    features and outputs of examples 17 * shard_size, ...
    store/checkpoint-0002/context.safetensors        the model output's context from the data (the CLIP bank)
    store/checkpoint-0002/gram-<curvature>.safetensors   Gram matrix, a cache: it can be made again from the shards

Completion protocol: a shard is written under a temporary name, flushed and renamed. So it has its own name only when it
is complete. A process that is killed at any moment leaves complete shards and, at worst, a hidden temporary folder. The
next run removes that folder. A shard's range depends only on the manifest, so any number of ranks, now or in a later
run, can share out the missing shards.

Every file states in its header what it is, and has a checksum. A file that was altered, moved or copied from elsewhere
is refused. If it is an extra, it is made again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_trak.features.dtypes import FeatureDtype, feature_dtype
from lightning_trak.features.identity import describe_difference
from lightning_trak.features.rows import Features, StoredFeatures, misfit
from lightning_trak.features.store_schemas import ENGINE, HEADER, KIND, SHARD_HEADER
from lightning_trak.storage import schemas
from lightning_trak.storage.claims import ClaimedDirectory, read_manifest
from lightning_trak.storage.files import (
    DamagedFileError,
    altered,
    load_metadata,
    load_tensors,
    read_json,
    save_tensors,
    tensor_digest,
    write_json,
)


class FeatureStore:
    """The features of one training set at a series of checkpoints.

    Args:
        directory: a local or mounted directory. It is made on first use.
        identity: everything that the features depend on, as values for JSON: seed, projection, checkpoints, ... An
            existing store must have been made with the same identity.
        num_examples: size of the training set.
        shard_size: examples per shard of a new store. An existing store keeps its own size.
        read_only: whether the store must exist already. Its manifest is then not written.
        user: the name of the method that opens the store, in errors.

    Attributes:
        key: a digest of the identity. Extras are stored with it.

    Raises:
        FileNotFoundError: if ``read_only`` is set and there is no store.
        NotADirectoryError: if the path is not a directory.
        ValueError: if the directory holds a store of another identity or data size (the error names the first
            difference), or if its manifest is damaged.
    """

    # Files whose checksum was verified, by path, size and time of change. Once per process is enough.
    _verified: ClassVar[set[tuple[Path, int, int]]] = set()

    def __init__(
        self,
        directory: str | Path,
        identity: dict[str, Any],
        num_examples: int,
        shard_size: int = 1024,
        read_only: bool = False,
        user: str = "TRAK",
    ) -> None:
        if not read_only and (num_examples < 1 or shard_size < 1):
            raise ValueError(f"num_examples and shard_size must be at least 1, got {num_examples=} and {shard_size=}")
        content = {"num_examples": num_examples, "shard_size": shard_size, "identity": identity}
        self._directory = ClaimedDirectory(directory, KIND, content, describe_difference, user, read_only)
        self.directory, self.key, manifest = self._directory.path, self._directory.key, self._directory.manifest
        self.num_examples: int = manifest["num_examples"]
        self.shard_size: int = manifest["shard_size"]
        self.num_checkpoints = len(manifest["identity"]["checkpoints"])
        self.num_shards = -(-self.num_examples // self.shard_size)
        self._k: int | None = None  # features per example, known once a shard was read or written

    @staticmethod
    def read_manifest(directory: str | Path) -> dict[str, Any]:
        """Read the manifest of an existing store.

        Raises:
            FileNotFoundError: if there is no store.
            ValueError: if the file is not a manifest, or has a format that this version cannot read.
        """
        return read_manifest(directory, KIND)

    def shard(self, index: int) -> range:
        """The positions of the examples of a shard."""
        start = index * self.shard_size
        return range(start, min(start + self.shard_size, self.num_examples))

    def _path(self, checkpoint: int, name: str) -> Path:
        return self.directory / f"checkpoint-{checkpoint:04d}" / f"{name}.safetensors"

    def _shard_path(self, checkpoint: int, shard: int) -> Path:
        return self._path(checkpoint, f"shard-{shard:05d}")

    def missing(self, checkpoint: int, extras: Sequence[str] = ()) -> list[int]:
        """The numbers of the shards of a checkpoint that must be made.

        These are the shards that do not exist, and those made by an engine that was found to be wrong.

        Args:
            checkpoint: the number of the checkpoint.
            extras: names of the extras that its features depend on. If one is lost, the first shard counts as missing,
                because extras are made when a shard is made.
        """
        refuted = self.refuted_engines()
        missing = [
            shard
            for shard in range(self.num_shards)
            if not self._shard_path(checkpoint, shard).exists()
            or (refuted and self.engine_of(checkpoint, shard) in refuted)
        ]
        if not missing and any(self.read_extra(checkpoint, name, self.key) is None for name in extras):
            return [0]
        return missing

    def begun(self) -> dict[int, int]:
        """The number of the first existing shard, for each checkpoint that has any."""
        there = {c: sorted(set(range(self.num_shards)) - set(self.missing(c))) for c in range(self.num_checkpoints)}
        return {checkpoint: shards[0] for checkpoint, shards in there.items() if shards}

    @property
    def data(self) -> str | None:
        """The digest of a few items of the training data; None if they differed when they were loaded twice."""
        found: str | None = self._directory.manifest["identity"].get("data")
        return found

    @property
    def repeatable(self) -> bool:
        """Whether the training data were the same when they were loaded twice."""
        return self.data is not None

    @property
    def precision(self) -> str | None:
        """The Trainer's precision in which features were computed; None if it is not known."""
        found: str | None = self._directory.manifest["identity"].get("precision")
        return found

    def require_complete(self) -> None:
        """Check that every shard exists.

        Raises:
            RuntimeError: if shards are missing. The error says how many.
        """
        missing = sum(len(self.missing(checkpoint)) for checkpoint in range(self.num_checkpoints))
        if missing:
            raise RuntimeError(
                f'store "{self.directory}" lacks {missing} of {self.num_shards * self.num_checkpoints} shards;'
                " call featurize again to finish it before scoring"
            )

    def write(self, checkpoint: int, shard: int, rows: Features, engine: str = "") -> None:
        """Write a complete shard.

        Args:
            checkpoint: the number of the checkpoint.
            shard: the number of the shard.
            rows: the rows of all its examples. They are rounded here, if the store's dtype is one of integers.
            engine: the engine that computed the gradients, see :meth:`engine_of`.

        Raises:
            ValueError: if the number of rows is not that of the shard's examples, or they do not fit the store.
            RuntimeError: if a later run of this process has claimed the directory, or the manifest was changed.
        """
        self._directory.require_unchanged()
        if len(rows.features) != len(self.shard(shard)):
            raise ValueError(f"shard {shard} holds {len(self.shard(shard))} examples, got {len(rows.features)} rows")
        dtype = self._dtype
        floating = None if dtype is None else feature_dtype(dtype.floating)
        reason = misfit(rows._asdict(), len(self.shard(shard)), floating, self._k)
        if reason is not None:
            raise ValueError(f"shard {shard} of checkpoint {checkpoint} cannot be written: {reason}")
        stored = StoredFeatures.encode(rows, dtype or feature_dtype(rows.features.dtype))
        self._k = stored.k
        path = self._shard_path(checkpoint, shard)
        about: dict[str, Any] = {
            "dtype": stored.dtype.name,
            "k": stored.k,
            "rounding_error": stored.rounding_error(rows),
        }
        save_tensors(path, stored.tensors, checkpoint=checkpoint, name=path.stem, key=self.key, engine=engine, **about)

    def read(self, checkpoint: int, shard: int) -> Features:
        """The rows of a shard. Features that are stored as integers are decoded; see :meth:`read_stored` for the rest.

        Raises:
            ValueError: if the file is truncated, altered or belongs elsewhere.
            OSError: if the file cannot be read.
        """
        return self.read_stored(checkpoint, shard).decode()

    def read_stored(self, checkpoint: int, shard: int) -> StoredFeatures:
        """A shard as it is stored, memory-mapped. Its checksum is verified the first time that this process reads it.

        Raises:
            ValueError: if the file is truncated, altered or belongs elsewhere.
            OSError: if the file cannot be read.
        """
        path = self._shard_path(checkpoint, shard)
        with _advice():
            tensors, metadata = self._load(path)
            _require_place(path, metadata, checkpoint, self.key, **SHARD_HEADER)
            dtype = feature_dtype(metadata["dtype"])
            if self._dtype not in (None, dtype):
                raise altered(path, f"its features are {dtype.name}, not {self._dtype and self._dtype.name}")
            if self._k not in (None, metadata["k"]):
                raise altered(path, f"it has {metadata['k']} features per example, but other shards have {self._k}")
            reason = misfit(tensors, len(self.shard(shard)), dtype, metadata["k"])
            if reason is not None:
                raise altered(path, reason)
        self._k = metadata["k"]
        return StoredFeatures.from_tensors(tensors, dtype, metadata["k"])

    @property
    def _dtype(self) -> FeatureDtype | None:
        """How features are stored, if the manifest says so."""
        name = self._directory.manifest["identity"].get("dtype")
        return None if name is None else feature_dtype(name)

    def rounding_error(self, checkpoint: int) -> float:
        """How much rounding to integers has changed the rows: root mean square, relative to each row's norm.

        0 if floats are stored.
        """
        shares = (self._shard_metadata(checkpoint, shard)["rounding_error"] for shard in range(self.num_shards))
        return float((sum(len(self.shard(i)) * share**2 for i, share in enumerate(shares)) / self.num_examples) ** 0.5)

    def engine_of(self, checkpoint: int, shard: int) -> str:
        """The engine that computed the gradients of a shard, see :meth:`write`."""
        return str(self._shard_metadata(checkpoint, shard)["engine"])

    def _shard_metadata(self, checkpoint: int, shard: int) -> dict[str, Any]:
        path = self._shard_path(checkpoint, shard)
        with _advice():
            metadata = load_metadata(path)
            _require_place(path, metadata, checkpoint, self.key, **SHARD_HEADER)
        return metadata

    def write_extra(self, checkpoint: int, name: str, tensors: dict[str, Tensor], key: str = "") -> None:
        """Write tensors that belong to a checkpoint as a whole. ``key`` identifies what they were made from."""
        save_tensors(self._path(checkpoint, name), tensors, checkpoint=checkpoint, name=name, key=key)

    def settle_extra(self, checkpoint: int, name: str, tensors: dict[str, Tensor], key: str = "") -> None:
        """Write an extra as :meth:`write_extra` does, unless another process was faster. Read it before you use it.

        Processes that make it from the same data may round differently, and all must use the same one.
        """
        try:
            save_tensors(self._path(checkpoint, name), tensors, False, checkpoint=checkpoint, name=name, key=key)
        except FileExistsError:
            if self.read_extra(checkpoint, name, key) is None:  # it is damaged
                self.write_extra(checkpoint, name, tensors, key)

    def remove_extra(self, name: str) -> None:
        """Remove an extra of all checkpoints, because it must be made again."""
        for checkpoint in range(self.num_checkpoints):
            self._path(checkpoint, name).unlink(missing_ok=True)

    def read_extra(self, checkpoint: int, name: str, key: str = "") -> dict[str, Tensor] | None:
        """Read tensors that :meth:`write_extra` wrote.

        Returns:
            The tensors. None if nothing was written with this ``key``. A damaged file gives a warning and None, because
            an extra can be made again.
        """
        path = self._path(checkpoint, name)
        if not path.exists():
            return None
        try:
            metadata = load_metadata(path)
            if metadata.get("key") != key:
                return None
            _require_place(path, metadata, checkpoint, key)
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
        with _advice():
            found: dict[str, Any] = read_json(self._engine_path, ENGINE)
        return found

    def digest(self, checkpoint: int) -> str:
        """A digest of all features of a checkpoint. It changes when a shard changes."""
        with _advice():
            sums = [load_metadata(self._shard_path(checkpoint, shard))["sha256"] for shard in range(self.num_shards)]
        return tensor_digest({"sums": torch.frombuffer(bytearray("".join(sums), "ascii"), dtype=torch.uint8)})

    def _load(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        status = path.stat()
        seen = (path.resolve(), status.st_size, status.st_mtime_ns)
        loaded = load_tensors(path, verify=seen not in self._verified)
        self._verified.add(seen)
        return loaded


@contextmanager
def _advice() -> Iterator[None]:
    try:
        yield
    except DamagedFileError as error:
        raise ValueError(f"{error}; delete it and call featurize again") from error


def _require_place(path: Path, metadata: dict[str, Any], checkpoint: int, key: str, **others: schemas.Schema) -> None:
    """Check that a file is what its name says, and was not moved or copied from elsewhere."""
    try:
        schemas.record({**HEADER, **others})("its header", metadata)
    except ValueError as error:
        raise altered(path, str(error)) from error
    found, wanted = (metadata["checkpoint"], metadata["name"], metadata["key"]), (checkpoint, path.stem, key)
    if found != wanted:
        store = "this store" if found[2] == key else "another store"
        raise DamagedFileError(path, f"holds {found[1]} of checkpoint {found[0]} of {store}")
