"""Features on disk: safetensors shards. Each is a fixed range of examples at one checkpoint, written once and whole.

    store/manifest.json                        what all features depend on, the data, and the size of shards
    store/engine-<key>.json                    the engine that computes gradients: equal bits need equal engines
    store/examples.safetensors                 the first examples, whose outputs are computed again before scoring
    store/checkpoint-<key>/shard-00017.safetensors    features and outputs of examples 17 * shard_size, ...
    store/checkpoint-<key>/context.safetensors        the model output's context from the data (the CLIP bank)
    store/checkpoint-<key>/gram-<curvature>.safetensors   Gram matrix, a cache: it can be made again from the shards

What features depend on is in two places. The manifest has what they all share: code, settings and data. The folder has
the key of the checkpoint: a digest of its weights, and of what else the model holds. So checkpoints can be added at any
time, and scored in any order and choice. The features of a checkpoint are the same whatever others the store has.

Completion protocol: a shard is written under a temporary name, flushed and renamed. So it has its own name only when it
is complete. A process that is killed at any moment leaves complete shards and, at worst, a hidden temporary folder. The
next run removes that folder. A shard's range depends only on the manifest, so any number of ranks, now or in a later
run, can share out the missing shards. If data are appended, their shards come after the old ones, see
:mod:`lightning_trak.features.store.growth`.

Every file states in its header what it is, and has a checksum. A file that was altered, moved or copied from elsewhere
is refused. If it is an extra, it is made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_trak.features.dtypes import FeatureDtype, feature_dtype
from lightning_trak.features.rows import Features, StoredFeatures, misfit
from lightning_trak.features.store.extras import StoredExtras, advice, require_place
from lightning_trak.features.store.growth import Sample, ShardRanges, last_part, parts_with, settled_parts
from lightning_trak.features.store.identity import describe_difference
from lightning_trak.features.store.schemas import KIND, SHARD_HEADER
from lightning_trak.storage.claims import ClaimedDirectory
from lightning_trak.storage.files import altered, load_metadata, save_tensors, tensor_digest
from lightning_trak.storage.manifests import read_manifest
from lightning_trak.storage.paths import local_directory
from lightning_trak.storage.schemas import json_digest
from lightning_trak.texts.printable import counted


class FeatureStore(StoredExtras):
    """The features of one training set at a series of checkpoints.

    Args:
        directory: a local or mounted directory. It is made on first use.
        identity: everything that the features depend on, as values for JSON: ``"dtype"``, seed, projection, ... An
            existing store must have been made with the same identity, other than ``"checkpoints"``: the keys of the
            run's checkpoints, in its order.
        num_examples: size of the training set; None: that of an existing store.
        shard_size: examples per shard of a new store. An existing store keeps its own size.
        read_only: whether the store must exist already. Its manifest is then not written.
        user: the name of the method that opens the store, in messages.
        sample: digests of some of the first examples of the training set, given how many. A store whose data have
            grown at their end can go on with it. None: data are compared by their size alone.
        overwrite: whether to delete what is not of this run: a store of another identity or of other data, and features
            at other checkpoints.

    Attributes:
        user: as given.
        key: a digest of the identity and of the data that the store began with. Extras are stored with it.
        checkpoints: the keys of the run's checkpoints.
        first: the position of the first checkpoint of each kind. Others have the same features.

    Raises:
        FileNotFoundError: if ``read_only`` is set and there is no store.
        NotADirectoryError: if the path is not a directory.
        ValueError: if the directory holds a store of another identity or data size (the error names the first
            difference), or if its manifest is damaged.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: dict[str, Any],
        num_examples: int | None,
        shard_size: int = 1024,
        read_only: bool = False,
        user: str = "TRAK",
        sample: Sample | None = None,
        overwrite: bool = False,
    ) -> None:
        if not read_only and (num_examples is None or num_examples < 1 or shard_size < 1):
            raise ValueError(f"num_examples and shard_size must be at least 1, got {num_examples=} and {shard_size=}")
        size = num_examples or 0
        new = [{"num_examples": size, "sample": None if sample is None else sample(size)}]
        shared = {name: value for name, value in identity.items() if name != "checkpoints"}
        content = {"identity": shared, "shard_size": shard_size, "data": new}

        self.directory = path = local_directory(directory, "store")
        self.user = user

        def extend(manifest: dict[str, Any], content: dict[str, Any]) -> dict[str, Any] | None:
            settled = settled_parts(path, manifest) or (manifest["data"] if read_only else None)
            parts = None if settled is None else parts_with(settled, num_examples, sample)
            return None if parts is None else content | {"data": parts}

        self.checkpoints: list[str] = identity["checkpoints"]
        self.num_checkpoints = len(self.checkpoints)
        self.first = [self.checkpoints.index(key) for key in dict.fromkeys(self.checkpoints)]
        folders = {self.folder(checkpoint).name for checkpoint in self.first}
        self._directory = ClaimedDirectory(
            directory,
            KIND,
            content,
            describe_difference,
            user,
            read_only,
            extend,
            overwrite,
            own=lambda path: "/" not in path or path.split("/")[0] in folders,
        )
        manifest = self._directory.manifest
        self.shard_size: int = manifest["shard_size"]
        self._parts: list[dict[str, Any]] = manifest["data"]
        self.num_examples: int = self._parts[-1]["num_examples"]
        self._ranges = ShardRanges([part["num_examples"] for part in self._parts], self.shard_size)
        self.num_shards = self._ranges.count
        self.key = json_digest([manifest["identity"], self._parts[0]])
        self._k: int | None = None  # features per example, known once a shard was read or written

    @staticmethod
    def read_manifest(directory: str | Path) -> dict[str, Any]:
        """Read the manifest of an existing store.

        Raises:
            FileNotFoundError: if there is no store.
            ValueError: if the file is not a manifest, or has a format that this version cannot read.
        """
        return read_manifest(directory, KIND)

    @staticmethod
    def size_of(directory: str | Path) -> int:
        """How many training examples an existing store has."""
        manifest, path = FeatureStore.read_manifest(directory), local_directory(directory, "store")
        return int(last_part(path, manifest)["num_examples"])

    @staticmethod
    def data_of(directory: str | Path) -> str | None:
        """What :attr:`data` of an existing store is."""
        part = last_part(local_directory(directory, "store"), FeatureStore.read_manifest(directory))
        return None if part["sample"] is None else part["sample"][0]

    @staticmethod
    def is_of(directory: str | Path, sample: Sample) -> bool:
        """Whether an existing store was made of some data, as far as anybody can tell.

        Args:
            directory: the store.
            sample: digests of some of the first examples of these data, given how many.
        """
        part = last_part(local_directory(directory, "store"), FeatureStore.read_manifest(directory))
        return part["sample"] is None or sample(part["num_examples"]) == part["sample"]

    def shard(self, index: int) -> range:
        """The positions of the examples of a shard."""
        return self._ranges[index]

    @property
    def begun_with(self) -> int:
        """The number of examples that the store began with. Fits are to these."""
        return int(self._parts[0]["num_examples"])

    def release(self) -> None:
        """Let other runs write to the store, or grow it. It can still be read."""
        self._directory.release()

    def _key_of(self, shard: int) -> str:
        """A digest of what the features of a shard depend on, other than the checkpoint."""
        part = self._ranges.part(shard)
        return json_digest([self.key, *self._parts[1 : part + 1]]) if part else self.key

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
        there = {checkpoint: self._existing(checkpoint) for checkpoint in self.first}
        return {checkpoint: shards[0] for checkpoint, shards in there.items() if shards}

    def _existing(self, checkpoint: int) -> list[int]:
        """The numbers of the shards of a checkpoint that are not :meth:`missing`."""
        return sorted(set(range(self.num_shards)) - set(self.missing(checkpoint)))

    @property
    def data(self) -> str | None:
        """The digest of a few items of the training data; None if they differed when they were loaded twice."""
        found: list[str] | None = self._parts[-1]["sample"]
        return None if found is None else found[0]

    @property
    def repeatable(self) -> bool:
        """Whether the training data were the same when they were loaded twice."""
        return self.data is not None

    @property
    def precision(self) -> str | None:
        """The Trainer's precision in which features were computed; None if it is not known."""
        found: str | None = self._directory.manifest["identity"].get("precision")
        return found

    @property
    def is_of_others(self) -> bool:
        """Whether it has features at some checkpoints, and none at those of the run."""
        mine = {self.folder(checkpoint).name for checkpoint in self.first}
        found = {path.parent.name for path in self.directory.glob("checkpoint-*/shard-*")}
        return bool(found) and not found & mine

    @property
    def complete(self) -> bool:
        """Whether every shard exists."""
        return not any(self.missing(checkpoint) for checkpoint in self.first)

    def require_complete(self) -> None:
        """Check that every shard exists.

        Raises:
            RuntimeError: if shards are missing. The error says how many.
        """
        missing = [len(self.missing(checkpoint)) for checkpoint in self.first]
        if not any(missing):
            return
        empty = [c for c, count in zip(self.first, missing, strict=True) if count == self.num_shards]
        others = {path.name for path in self.directory.glob("checkpoint-*")} - {self.folder(c).name for c in empty}
        about = f", all those at {counted(len(empty), 'checkpoint')}: {', '.join(map(str, empty))}" if empty else ""
        if empty and others:
            about += f", whose weights or buffers it does not have (it has {counted(len(others), 'other checkpoint')})"
        raise RuntimeError(
            f'store "{self.directory}" lacks {sum(missing)} of {self.num_shards * len(self.first)} shards{about};'
            " call featurize again to finish it before scoring"
        )

    @property
    def rounds_features(self) -> bool:
        """Whether features are stored as integers."""
        return self.dtype.quantizer is not None

    def write(self, checkpoint: int, shard: int, rows: Features, engine: str = "", skipped: Sequence[int] = ()) -> None:
        """Write a complete shard: :meth:`round` and :meth:`save` in one."""
        self.save(checkpoint, shard, self.round(checkpoint, shard, rows), engine, skipped)

    def round(self, checkpoint: int, shard: int, rows: Features) -> StoredFeatures:
        """Round the rows of a shard, if the store's dtype is one of integers.

        Args:
            checkpoint: the number of the checkpoint.
            shard: the number of the shard.
            rows: the rows of all its examples.

        Raises:
            ValueError: if the number of rows is not that of the shard's examples, or they do not fit the store.
        """
        reason = misfit(rows._asdict(), len(self.shard(shard)), feature_dtype(self.dtype.floating), self._k)
        if reason is not None:
            raise ValueError(f"shard {shard} of checkpoint {checkpoint} cannot be written: {reason}")
        stored = StoredFeatures.encode(rows, self.dtype)
        self._k = stored.k
        return stored.on_host()

    def save(
        self, checkpoint: int, shard: int, rows: StoredFeatures, engine: str = "", skipped: Sequence[int] = ()
    ) -> None:
        """Write a complete shard to its file.

        Args:
            checkpoint: the number of the checkpoint.
            shard: the number of the shard.
            rows: the result of :meth:`round`.
            engine: the engine that computed the gradients, see :meth:`engine_of`.
            skipped: positions of examples whose features are not finite. Their rows are zeros.

        Raises:
            RuntimeError: if a later run of this process has claimed the directory, or the manifest was changed.
        """
        self._directory.require_unchanged()
        path = self._shard_path(checkpoint, shard)
        about: dict[str, Any] = {"dtype": rows.dtype.name, "k": rows.k, "skipped": list(skipped)}
        place = self._about(checkpoint, path.stem, self._key_of(shard))
        save_tensors(path, rows.tensors, **place, engine=engine, **about)

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
        with advice():
            tensors, metadata = self._load(path)
            require_place(path, metadata, self.checkpoints[checkpoint], self._key_of(shard), **SHARD_HEADER)
            dtype = feature_dtype(metadata["dtype"])
            if dtype != self.dtype:
                raise altered(path, f"its features are {dtype.name}, not {self.dtype.name}")
            if self._k not in (None, metadata["k"]):
                raise altered(path, f"it has {metadata['k']} features per example, but other shards have {self._k}")
            reason = misfit(tensors, len(self.shard(shard)), dtype, metadata["k"])
            if reason is not None:
                raise altered(path, reason)
        self._k = metadata["k"]
        return StoredFeatures.from_tensors(tensors, dtype, metadata["k"])

    @property
    def dtype(self) -> FeatureDtype:
        """How features are stored."""
        return feature_dtype(self._directory.manifest["identity"]["dtype"])

    def engine_of(self, checkpoint: int, shard: int) -> str:
        """The engine that computed the gradients of a shard, see :meth:`write`."""
        return str(self._shard_metadata(checkpoint, shard)["engine"])

    def settle_engine(self, engine: str | None = None) -> str | None:
        """See :meth:`StoredExtras.settle_engine`. If its file was deleted, the engine of the shards counts."""
        found = super().settle_engine(engine)
        if found is not None:
            return found
        engines = {
            self.engine_of(checkpoint, shard)
            for checkpoint in self.first
            for shard in range(self.num_shards)
            if self._shard_path(checkpoint, shard).exists()
        } - {""}
        return engines.pop() if len(engines) == 1 else None

    @property
    def skipped(self) -> list[int]:
        """Positions of the examples that have no features at one or more of the checkpoints, in order."""
        found: set[int] = set()
        for checkpoint in self.first:
            for shard in self._existing(checkpoint):
                found.update(self.skipped_of(checkpoint, shard))
        return sorted(found)

    def skipped_of(self, checkpoint: int, shard: int) -> list[int]:
        """Positions of the examples of a shard that have no features, see :meth:`write`."""
        skipped: list[int] = self._shard_metadata(checkpoint, shard)["skipped"]
        return skipped

    def _shard_metadata(self, checkpoint: int, shard: int) -> dict[str, Any]:
        path = self._shard_path(checkpoint, shard)
        with advice():
            metadata = load_metadata(path)
            require_place(path, metadata, self.checkpoints[checkpoint], self._key_of(shard), **SHARD_HEADER)
        return metadata

    def digest(self, checkpoint: int, num_shards: int | None = None) -> str:
        """A digest of all features of a checkpoint, or of its first shards. It changes when a shard changes."""
        shards = range(self.num_shards if num_shards is None else num_shards)
        with advice():
            sums = [load_metadata(self._shard_path(checkpoint, shard))["sha256"] for shard in shards]
        return tensor_digest({"sums": torch.frombuffer(bytearray("".join(sums), "ascii"), dtype=torch.uint8)})
