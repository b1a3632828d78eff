"""Features on disk: safetensors shards, each a fixed range of examples at one checkpoint, written once and whole.

    store/manifest.json                        what every feature depends on, and how examples fall into shards
    store/engine-<key>.json                    how gradients were computed: equal bits need equal engines
    store/checkpoint-0002/shard-00017.safetensors    features and outputs of examples 17 * shard_size, ...
    store/checkpoint-0002/context.safetensors        what the model output remembers of the data (the CLIP bank)
    store/checkpoint-0002/gram-<curvature>.safetensors   Gram matrix, a cache: it can be made again from the shards

Completion protocol: a shard exists under its own name only when it is complete, because it is written elsewhere,
flushed and renamed. A process killed at any moment leaves complete shards and, at worst, a hidden temporary file. A
shard's range depends on the manifest alone, so any number of ranks, now or in a later run, can share out the missing
ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_trak.files import load_metadata, load_tensors, read_manifest, save_tensors, tensor_digest, write_json
from lightning_trak.fingerprints import are_same, changes

FORMAT_VERSION = 2


class Features(NamedTuple):
    """Rows of a shard, or of a batch.

    Attributes:
        features: projected gradients phi, shape ``(n, k)``.
        outputs: model outputs f, shape ``(n,)``.
        residuals: Q = -dl/df, shape ``(n,)``.
        curvatures: R = d2l/df2, shape ``(n,)``.
    """

    features: Tensor
    outputs: Tensor
    residuals: Tensor
    curvatures: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Features]) -> Features:
        """The rows of all parts, one after another."""
        return cls(*(torch.cat(column) for column in zip(*parts, strict=True)))


class FeatureStore:
    """The features of one training set at a series of checkpoints.

    Args:
        directory: a local or mounted directory; made on first use.
        identity: everything that the features depend on, as JSON-able values: seed, projection, checkpoints, ... A
            store that exists must have been made with the same.
        num_examples: size of the training set.
        shard_size: examples per shard of a new store; one that exists keeps its own.
        read_only: the store must exist, and its manifest is left alone.
        user: what to call the method that opens the store, in errors.

    Attributes:
        key: stands for the identity: what extras were made under.

    Raises:
        ValueError: if the directory holds a store of another identity or data size, naming the first difference.
    """

    # Files whose checksum has been found right, by path, size and time of change: once in a process is enough.
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
        if "://" in str(directory):
            raise ValueError(f'a store must be on a disk, since it is memory-mapped, got "{directory}"')
        self.directory = Path(directory).expanduser()
        path = self.directory / "manifest.json"
        if not read_only and not path.exists():
            self._create(path, identity, num_examples, shard_size)
        manifest = self.read_manifest(directory)
        stored = {"num_examples": manifest["num_examples"]} | manifest["identity"]
        wanted = {"num_examples": num_examples} | json.loads(json.dumps(identity))
        differs = any(not are_same(stored.get(field), value) for field, value in wanted.items())
        if differs and not read_only and self._is_empty():
            # Of a run that failed before its first shard, over a mistake that has been mended since.
            path.unlink(missing_ok=True)
            self._create(path, identity, num_examples, shard_size)
            manifest = self.read_manifest(directory)
        else:
            self._compare(stored, wanted, user)
        self._manifest = manifest
        self.key = hashlib.sha256(json.dumps(manifest["identity"], sort_keys=True).encode()).hexdigest()
        self.num_examples: int = manifest["num_examples"]
        self.shard_size: int = manifest["shard_size"]
        self.num_checkpoints = len(manifest["identity"]["checkpoints"])
        self.num_shards = -(-self.num_examples // self.shard_size)

    def _is_empty(self) -> bool:
        return not any(self.directory.glob("checkpoint-*/shard-*"))

    def _create(self, path: Path, identity: dict[str, Any], num_examples: int, shard_size: int) -> None:
        if num_examples < 1 or shard_size < 1:
            raise ValueError(f"a store needs examples and shards, got {num_examples=} and {shard_size=}")
        if not self._is_empty():
            raise ValueError(f'"{self.directory}" holds shards but no manifest.json; use another directory')
        manifest = {
            "format": FORMAT_VERSION,
            "num_examples": num_examples,
            "shard_size": shard_size,
            "identity": identity,
        }
        with suppress(FileExistsError):  # another process was faster: its manifest counts
            write_json(path, manifest, replace=False)

    @staticmethod
    def read_manifest(directory: str | Path) -> dict[str, Any]:
        """The manifest of a store that exists.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is not one, or of a format that this version cannot read.
        """
        return read_manifest(directory, "feature store", FORMAT_VERSION, "call featurize first")

    def _compare(self, stored: dict[str, Any], wanted: dict[str, Any], user: str) -> None:
        for field, mine in wanted.items():
            theirs = stored.get(field)
            if are_same(mine, theirs):
                continue
            if field == "data":
                made, have = "other training data of this size", "data that differ in eight items spread over them"
            elif field == "checkpoints" and isinstance(theirs, list) and len(theirs) == len(mine):
                number = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
                made, have = f"other weights as checkpoint {number}", "the same number of them"
            elif field in ("checkpoints", "parameters") and isinstance(theirs, list):
                made, have = f"{len(theirs)} {field}", f"{len(mine)}"
                differing = [item[0] for item in [*mine, *theirs] if (item in mine) != (item in theirs)]
                if field == "parameters":
                    have += f" (differing in {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''})"
            elif isinstance(mine, dict) and isinstance(theirs, dict):
                made, have = f"another {field}", f"one that differs: {changes(theirs, mine)}"
            else:
                made, have = f"{field} {theirs}", f"{field} {mine}"
            raise ValueError(
                f'store "{self.directory}" was made with {made}, this {user} has {have}; use another directory or the'
                f" same {field}"
            )

    def shard(self, index: int) -> range:
        """The examples of a shard."""
        start = index * self.shard_size
        return range(start, min(start + self.shard_size, self.num_examples))

    def _path(self, checkpoint: int, name: str) -> Path:
        return self.directory / f"checkpoint-{checkpoint:04d}" / f"{name}.safetensors"

    def _shard_path(self, checkpoint: int, shard: int) -> Path:
        return self._path(checkpoint, f"shard-{shard:05d}")

    def missing(self, checkpoint: int) -> list[int]:
        """Shards of a checkpoint that are not on disk yet."""
        return [shard for shard in range(self.num_shards) if not self._shard_path(checkpoint, shard).exists()]

    def require_complete(self) -> None:
        """Check that every shard is there.

        Raises:
            RuntimeError: if some are missing, saying how many.
        """
        missing = sum(len(self.missing(checkpoint)) for checkpoint in range(self.num_checkpoints))
        if missing:
            raise RuntimeError(
                f'store "{self.directory}" lacks {missing} of {self.num_shards * self.num_checkpoints} shards;'
                " call featurize again to finish it before scoring"
            )

    def write(self, checkpoint: int, shard: int, rows: Features) -> None:
        """Write a complete shard.

        Raises:
            ValueError: if the rows are not as many as the shard's examples.
            RuntimeError: if another run has replaced the manifest since this object was made.
        """
        if self.read_manifest(self.directory) != self._manifest:
            raise RuntimeError(f'another run has taken store "{self.directory}" over; give each run a directory')
        if len(rows.features) != len(self.shard(shard)):
            raise ValueError(f"shard {shard} holds {len(self.shard(shard))} examples, got {len(rows.features)} rows")
        save_tensors(self._shard_path(checkpoint, shard), rows._asdict(), key="")

    def read(self, checkpoint: int, shard: int) -> Features:
        """Read a shard, memory-mapped; its checksum is verified the first time that this process reads it.

        Raises:
            ValueError: if the file is truncated or altered.
        """
        path = self._shard_path(checkpoint, shard)
        rows = Features(**self._load(path))
        if len(rows.features) != len(self.shard(shard)):
            raise self._damaged(path, f"it holds {len(rows.features)} examples, not {len(self.shard(shard))}")
        return rows

    def write_extra(self, checkpoint: int, name: str, tensors: dict[str, Tensor], key: str = "") -> None:
        """Write tensors that belong to a checkpoint as a whole; ``key`` says what they were made from."""
        save_tensors(self._path(checkpoint, name), tensors, key=key)

    def read_extra(self, checkpoint: int, name: str, key: str = "") -> dict[str, Tensor] | None:
        """Read what :meth:`write_extra` wrote, or None if nothing was written with this ``key``."""
        path = self._path(checkpoint, name)
        return self._load(path) if path.exists() and self._metadata(path).get("key") == key else None

    def settle_engine(self, engine: str | None = None) -> str | None:
        """How gradients are computed in every run on this store: the first one that says so decides.

        Args:
            engine: this process's choice, or None if it has none.

        Returns:
            The engine that was decided on; None if there is none yet.
        """
        path = self.directory / f"engine-{self.key[:16]}.json"
        if engine is not None:
            with suppress(FileExistsError):  # another run or process was faster
                write_json(path, {"engine": engine}, replace=False)
        if not path.exists():
            return None
        try:
            return str(json.loads(path.read_text())["engine"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise self._damaged(path, repr(error)) from error

    def digest(self, checkpoint: int) -> str:
        """Stands for all features of a checkpoint: changes when a shard does."""
        sums = [self._metadata(self._shard_path(checkpoint, shard))["sha256"] for shard in range(self.num_shards)]
        return tensor_digest({"sums": torch.frombuffer(bytearray("".join(sums), "ascii"), dtype=torch.uint8)})

    def _metadata(self, path: Path) -> dict[str, Any]:
        try:
            return load_metadata(path)
        except ValueError as error:
            raise self._damaged(path, str(error)) from error

    def _load(self, path: Path) -> dict[str, Tensor]:
        status = path.stat()
        seen = (path.resolve(), status.st_size, status.st_mtime_ns)
        try:
            tensors, _ = load_tensors(path, verify=seen not in self._verified)
        except ValueError as error:
            raise self._damaged(path, str(error)) from error
        self._verified.add(seen)
        return tensors

    @staticmethod
    def _damaged(path: Path, reason: str) -> ValueError:
        return ValueError(f'"{path}" is truncated or altered ({reason}); delete it and call featurize again')
