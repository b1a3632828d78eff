"""The snapshots of one training run, in a directory that is local or anywhere that fsspec reaches.

    snapshots/manifest.json                     which run, and step, epoch and optimizer settings of each snapshot
    snapshots/snapshot-00000100.safetensors     the LightningModule's state dict after 100 optimizer steps

What the manifest does not name is not part of the series. A save writes the tensors first, which get their name once
they are whole and on disk, and then replaces the manifest in one step. So a crash at any moment leaves the earlier
snapshots as they were, and at worst a file that nothing refers to: a hidden one, removed when the run is resumed, or
that of the snapshot, overwritten when its step is saved again.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_trak.files import remove_leftovers, write_atomically, write_json

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ParameterGroup:
    """Settings of one parameter group of an optimizer in the last step before a snapshot.

    Attributes:
        optimizer: position in ``trainer.optimizers``.
        algorithm: class name of the optimizer, which says how it applies the weight decay.
        lr: learning rate, or None where the optimizer has no such setting.
        weight_decay: weight decay, or None where the optimizer has no such setting.
        parameters: names of those of its parameters that the module has.
    """

    optimizer: int
    algorithm: str
    lr: float | None
    weight_decay: float | None
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Snapshot:
    """An entry of the manifest.

    Attributes:
        file: name of the safetensors file in the directory.
        step: optimizer steps taken, as ``trainer.global_step`` counts them (over all optimizers).
        epoch: training epochs completed.
        parameter_groups: settings of each parameter group of each optimizer.
    """

    file: str
    step: int
    epoch: int
    parameter_groups: tuple[ParameterGroup, ...]


@dataclass(frozen=True)
class Manifest:
    """What a directory of snapshots holds.

    Attributes:
        run: identifier of the training run, kept when the run is resumed.
        snapshots: in the order of their steps.
    """

    run: str
    snapshots: tuple[Snapshot, ...]


class SnapshotSeries:
    """Reads and writes a directory of snapshots. One process writes; any number read.

    Args:
        directory: a path, or a URL that fsspec understands, such as ``s3://bucket/run/snapshots``.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.fspath(directory)
        self.filesystem, root = url_to_fs(self.directory)
        local = isinstance(self.filesystem, LocalFileSystem)
        self._root = os.path.normpath(root) if local else str(root).rstrip("/")

    @property
    def url(self) -> str:
        """The directory in one canonical spelling."""
        return str(self.filesystem.unstrip_protocol(self._root))

    def path(self, name: str) -> str:
        """Path of a file of the series on its file system."""
        return f"{self._root}/{name}"

    def read(self) -> Manifest:
        """The manifest.

        Raises:
            FileNotFoundError: if the directory has none.
            ValueError: if it is not one, or of a format that this version cannot read.
        """
        try:
            content = self.filesystem.cat_file(self.path(MANIFEST))
        except (FileNotFoundError, NotADirectoryError) as error:
            found = "it does not exist" if not self.filesystem.exists(self._root) else f"it has no {MANIFEST}"
            raise FileNotFoundError(
                f'"{self.directory}" is not a directory that TRAKCallback has written: {found}; give checkpoint'
                " files as a list of their paths"
            ) from error
        try:
            manifest: dict[str, Any] = json.loads(content)
            if manifest["format"] != FORMAT_VERSION:
                raise ValueError(f"it has format {manifest['format']}, and this version reads {FORMAT_VERSION}")
            return Manifest(manifest["run"], tuple(_parse(entry) for entry in manifest["snapshots"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'"{self.directory}/{MANIFEST}" is not the manifest of a snapshot series: {error}'
            ) from error

    def begin(self) -> str:
        """Start the series of a new run.

        Returns:
            The new run's identifier.

        Raises:
            ValueError: if the directory holds snapshots already.
        """
        existing = self._existing()
        if existing is not None and existing.snapshots:
            raise ValueError(self._occupied(existing))
        run = uuid.uuid4().hex
        self._start(Manifest(run, ()))
        return run

    def resume(self, runs: Sequence[str], step: int) -> Manifest:
        """Continue the series of a run at an optimizer step; entries of later steps leave the manifest.

        Their files stay until the resumed run saves the same steps.

        Args:
            runs: identifiers that the run may have here; an empty directory takes the first.
            step: optimizer steps that the resumed run has taken.

        Raises:
            ValueError: if the directory holds snapshots of another run.
        """
        existing = self._existing()
        if existing is None or not existing.snapshots:
            manifest = Manifest(runs[0], ())
        elif existing.run in runs:
            manifest = Manifest(existing.run, tuple(s for s in existing.snapshots if s.step <= step))
        else:
            raise ValueError(self._occupied(existing))
        self._start(manifest)
        return manifest

    def save(
        self, state_dict: Mapping[str, Tensor], step: int, epoch: int, parameter_groups: Sequence[ParameterGroup]
    ) -> Snapshot:
        """Add a snapshot; one of the same step is replaced.

        Args:
            state_dict: dense tensors on any device; tied and non-contiguous ones are allowed.
            step: optimizer steps taken.
            epoch: training epochs completed.
            parameter_groups: settings of each parameter group of each optimizer.

        Raises:
            FileNotFoundError: if neither :meth:`begin` nor :meth:`resume` has made a manifest.
            TypeError: if an entry of the state dict is not a dense tensor.
        """
        manifest = self.read()
        tensors, aliases = _untie(state_dict)
        snapshot = Snapshot(f"snapshot-{step:08d}.safetensors", step, epoch, tuple(parameter_groups))
        path = self.path(snapshot.file)
        if isinstance(self.filesystem, LocalFileSystem):
            write_atomically(Path(path), lambda temporary: safetensors.torch.save_file(tensors, temporary, aliases))
        else:
            self.filesystem.pipe_file(path, safetensors.torch.save(tensors, aliases))
        others = [other for other in manifest.snapshots if other.step != step]
        snapshots = sorted([*others, snapshot], key=lambda entry: entry.step)
        self._replace_manifest(Manifest(manifest.run, tuple(snapshots)))
        return snapshot

    def _existing(self) -> Manifest | None:
        try:
            return self.read()
        except FileNotFoundError:
            return None

    def _occupied(self, manifest: Manifest) -> str:
        return (
            f'"{self.directory}" holds {len(manifest.snapshots)} snapshots of another run, up to step'
            f" {manifest.snapshots[-1].step}; use another directory, delete this one, or continue that run with"
            " trainer.fit(ckpt_path=...) from a checkpoint that it saved"
        )

    def _start(self, manifest: Manifest) -> None:
        if isinstance(self.filesystem, LocalFileSystem):
            remove_leftovers(Path(self._root))
        self._replace_manifest(manifest)

    def _replace_manifest(self, manifest: Manifest) -> None:
        content = {"format": FORMAT_VERSION, **asdict(manifest)}
        path = self.path(MANIFEST)
        if isinstance(self.filesystem, LocalFileSystem):
            write_json(Path(path), content)
        else:
            self.filesystem.makedirs(self._root, exist_ok=True)
            self.filesystem.pipe_file(path, json.dumps(content).encode())  # object stores replace an object in one step


def read_safetensors(location: str) -> dict[str, Tensor]:
    """Read a safetensors file, local or remote, tied tensors included.

    Tied tensors are noted as ``safetensors.torch.save_model`` does: the header's metadata maps each name that was left
    out to the name that holds its tensor.

    Args:
        location: a path or URL.

    Returns:
        Name -> tensor on CPU; tied names share one tensor.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated or not a safetensors file.
    """
    filesystem, path = url_to_fs(location)
    try:
        if isinstance(filesystem, LocalFileSystem):
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        else:
            content = filesystem.cat_file(path)
            tensors = safetensors.torch.load(content)
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            metadata = header.get("__metadata__", {})
    except SafetensorError as error:
        raise ValueError(f'"{location}" is truncated or not a safetensors file: {error}') from error
    aliases = {name: tensors[kept] for name, kept in metadata.items() if kept in tensors and name not in tensors}
    return tensors | aliases


def require_tensors(state_dict: Mapping[Any, Any], source: str) -> None:
    """Check that a state dict maps names to dense tensors.

    Raises:
        TypeError: if not, naming ``source`` and the first entry that is something else.
    """
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            found = type(value).__name__
        elif value.layout != torch.strided:
            found = f"a {value.layout} tensor"
        elif not isinstance(name, str):
            found = "not a name"
        else:
            continue
        raise TypeError(f"expected a state dict of names and dense tensors in {source}, but {name!r} is {found}")


def _untie(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU copies of the distinct tensors, and name -> name that holds its tensor for the tied ones."""
    require_tensors(state_dict, "the module's state dict")
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    holders: dict[tuple[Any, ...], str] = {}
    for name, tensor in state_dict.items():
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        holder = holders.setdefault(view, name) if tensor.numel() else name
        if holder != name:
            aliases[name] = holder
        else:  # a copy of its own, because safetensors refuses overlapping views as well
            copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
            tensors[name] = copy.copy_(tensor.detach())
    return tensors, aliases


def _parse(entry: dict[str, Any]) -> Snapshot:
    groups = tuple(
        ParameterGroup(**(group | {"parameters": tuple(group["parameters"])})) for group in entry["parameter_groups"]
    )
    return Snapshot(**(entry | {"parameter_groups": groups}))
