"""The snapshots of one training run, in a local directory or any other that fsspec reaches.

    snapshots/manifest.json                     the run, and the step, epoch and optimizer settings of each snapshot
    snapshots/snapshot-00000100.safetensors     the module's state dict after 100 optimizer steps
    snapshots/preconditioner-00000100.safetensors   if asked for, what the optimizer multiplies gradients by

A file that the manifest does not name is not part of the series. A save first writes the tensors. Their file gets its
name once it is whole and on disk. Then the manifest is replaced in one step. So a crash at any moment does not change
the earlier snapshots. At worst it leaves a file that the manifest does not name. A hidden file is removed when the run
is resumed. The file of a new snapshot is overwritten when its step is saved again. The manifest holds the size and
checksum of each file, and a checksum of itself.

One process writes. Meanwhile it holds a lock on the directory. The kernel releases the lock when the process dies. Some
file systems have no locks, so the manifest also names its writer. A process that finds another writer there writes
nothing.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import Tensor

from lightning_trak.checkpoints.manifest import (
    Manifest,
    ParameterGroup,
    Snapshot,
    TensorFile,
    file_name,
    preconditioner_name,
)
from lightning_trak.checkpoints.weights import pack, read_safetensors, without_extra_state, write_safetensors
from lightning_trak.checks import require_bool
from lightning_trak.storage.files import remove_leftovers, write_json
from lightning_trak.storage.locations import locate
from lightning_trak.storage.locks import Lock, hold
from lightning_trak.storage.manifests import MANIFEST


class SnapshotSeries:
    """Reads and writes a directory of snapshots. One process writes; any number read.

    Args:
        directory: a path, or a URL that fsspec understands, such as ``s3://bucket/run/snapshots``.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._location = locate(directory)
        self.filesystem, root, self.directory = self._location
        self._root = root.rstrip("/")
        self._writer: str | None = None
        self._lock: Lock | None = None

    @property
    def url(self) -> str:
        """The directory in one canonical spelling."""
        return str(self.filesystem.unstrip_protocol(self._root))

    def path(self, name: str) -> str:
        """The path of a file of the series on its file system."""
        return f"{self._root}/{name}"

    def read(self) -> Manifest:
        """Read the manifest.

        Raises:
            FileNotFoundError: if the directory has no manifest.
            ValueError: if the file is not a manifest, was altered, or has a format that this version cannot read.
        """
        try:
            self._location.inside(MANIFEST).require_regular()
            content = self.filesystem.cat_file(self.path(MANIFEST))
        except (FileNotFoundError, NotADirectoryError) as error:
            found = "it does not exist" if not self.filesystem.exists(self._root) else f"it has no {MANIFEST}"
            raise FileNotFoundError(
                f'"{self.directory}" is not a directory that TRAKCallback has written: {found}; check the path, or'
                " pass checkpoint files as a list of their paths"
            ) from error
        try:
            return Manifest.parse(content)
        except ValueError as error:
            raise ValueError(
                f'"{self.directory}/{MANIFEST}" is not the manifest of a snapshot series, or was altered: {error};'
                " restore it from a copy, name a directory that TRAKCallback has written, or pass a list of the paths"
                " of the snapshots"
            ) from error

    def load(self, stored: TensorFile) -> dict[str, Tensor]:
        """Read the tensors of a file, as :func:`~lightning_trak.checkpoints.weights.read_safetensors` does.

        Raises:
            FileNotFoundError: if the file no longer exists.
            ValueError: if it was altered or replaced.
        """
        return read_safetensors(self._location.inside(stored.file), stored.size, stored.sha256)

    def open(self, runs: Sequence[str] = (), step: int = 0, overwrite: bool = False) -> Manifest:
        """Start or continue the series of a run at an optimizer step, and hold the directory until :meth:`close`.

        Snapshots of later steps are removed from the manifest. Their files stay until the resumed run saves the same
        steps.

        Args:
            runs: identifiers that the run may have here; an empty directory takes the first. If there are none, the run
                is new and gets one.
            step: optimizer steps that the run has taken.
            overwrite: whether to delete the snapshots of another run.

        Raises:
            ValueError: if the directory holds snapshots of another run, or another run is writing to it.
        """
        require_bool("overwrite", overwrite)
        held, run = self._hold(), runs[0] if runs else uuid.uuid4().hex
        existing: Manifest | None = None
        with suppress(FileNotFoundError):
            existing = self.read()
        if existing is None or not existing.snapshots:
            if existing is not None and not runs and not held:
                rank_zero_warn(
                    f'another run has begun in "{self.directory}" and has saved no snapshot yet; this run takes the'
                    " directory: if the other run is still going, it ends with an error at its first snapshot"
                )
            return self._start(run, ())
        if existing.run in runs:
            return self._start(existing.run, tuple(s for s in existing.snapshots if s.step <= step))
        if not (overwrite and held):
            self.close()
            raise ValueError(self._occupied(existing))
        manifest = self._start(run, ())
        for file in (file for snapshot in existing.snapshots for file in snapshot.files):
            Path(self.path(file)).unlink(missing_ok=True)
        return manifest

    def save(
        self,
        state_dict: Mapping[str, Any],
        step: int,
        epoch: int,
        parameter_groups: Sequence[ParameterGroup],
        preconditioner: Mapping[str, Tensor] | None = None,
        frozen: str | None = None,
    ) -> Snapshot:
        """Add a snapshot. It replaces one of the same step.

        Args:
            state_dict: dense tensors on any device; tied and non-contiguous ones are allowed. Extra state is left out.
            step: optimizer steps taken.
            epoch: training epochs completed.
            parameter_groups: settings of each parameter group of each optimizer.
            preconditioner: what the optimizer multiplies gradients by, for each parameter; None: it is not kept.
            frozen: checksum of the parameters that the state dict leaves out; None if it has all.

        Raises:
            FileNotFoundError: if :meth:`open` has made no manifest.
            ValueError: if another run has taken the directory in the meantime.
            TypeError: if an entry of the state dict is not a dense tensor.
            OSError: if it cannot be written; earlier snapshots are not changed.
        """
        manifest = self.read()
        if manifest.writer != self._writer:
            raise ValueError(
                f'another run took "{self.directory}" after this one began, so the snapshot of step {step} was not'
                " saved; give each run its own directory"
            )
        file, weights = file_name(step), without_extra_state(state_dict, "the module's state dict")
        try:
            stored = self._write_tensors(file, weights)
            also = None if preconditioner is None else self._write_tensors(preconditioner_name(step), preconditioner)
            groups = tuple(parameter_groups)
            snapshot = Snapshot(file, stored.size, stored.sha256, step, epoch, groups, also, frozen)
            others = [other for other in manifest.snapshots if other.step != step]
            snapshots = sorted([*others, snapshot], key=lambda entry: entry.step)
            self._replace_manifest(Manifest(manifest.run, manifest.writer, tuple(snapshots)))
        except (OSError, SafetensorError) as error:
            number = getattr(error, "errno", None)
            reason = (
                f'snapshot "{self.directory}/{file}" was not saved: {error}; free some space or correct the'
                " permissions, then resume the run: its earlier snapshots are complete"
            )
            raise (OSError(number, reason) if number else OSError(reason)) from error
        return snapshot

    def close(self) -> None:
        """Release the directory, so that another run may write to it."""
        self._writer = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold(self) -> bool:
        """Take the lock. Returns whether this file system has locks."""
        if self._lock is not None:
            return True
        if not self._location.is_local:
            return False
        self._lock = hold(Path(self._root), self.directory, "snapshots")
        return self._lock is not None

    def _occupied(self, manifest: Manifest) -> str:
        return (
            f'"{self.directory}" holds {len(manifest.snapshots)} snapshots of another run, up to step'
            f" {manifest.snapshots[-1].step}; use another directory, overwrite=True to delete them (needs a file system"
            " with locks), or exist_ok=True in both runs if this one starts again from the same weights; or continue"
            " that run with trainer.fit(ckpt_path=...) from a checkpoint that it saved; with Hugging Face, with"
            " trainer.train(resume_from_checkpoint=...); with Fabric, with fabric.load of a state that has its"
            " FabricSnapshots"
        )

    def _start(self, run: str, snapshots: tuple[Snapshot, ...]) -> Manifest:
        if self._location.is_local:
            remove_leftovers(Path(self._root))
        self._writer = uuid.uuid4().hex
        manifest = Manifest(run, self._writer, snapshots)
        self._replace_manifest(manifest)
        return manifest

    def _write_tensors(self, file: str, tensors: Mapping[str, Tensor]) -> TensorFile:
        path = self.path(file)
        if self._location.is_local:
            checksum = write_safetensors(Path(path), tensors)
            return TensorFile(file, os.stat(path).st_size, checksum)
        packed, metadata, checksum = pack(tensors)
        content = safetensors.torch.save(packed, metadata)
        self.filesystem.pipe_file(path, content)
        return TensorFile(file, len(content), checksum)

    def _replace_manifest(self, manifest: Manifest) -> None:
        content = manifest.to_json()  # never write what could not be read again
        path = self.path(MANIFEST)
        if self._location.is_local:
            write_json(Path(path), content)
        else:
            self.filesystem.makedirs(self._root, exist_ok=True)
            self.filesystem.pipe_file(path, json.dumps(content).encode())  # object stores replace an object in one step
