"""The recording of one training run, in a local directory.

    recording/manifest.json                           the run, what trained it, and the parts
    recording/part-00000000-00000400.safetensors      steps 0 to 399, and the full states among them

A part holds step records and full states. It is written under a temporary name, flushed and renamed. Then the manifest
is replaced in one step. So a crash at any moment loses what was not written yet, and nothing else. A file that the
manifest does not name is not part of the recording. All files carry checksums.

One process writes, and holds a lock on the directory. The kernel releases the lock when the process dies. Some file
systems have no locks, so the manifest also names its writer. A process that finds another writer there writes nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_trak.replay.recording.flat_states import Layout, layouts_schema, unpack_state
from lightning_trak.replay.recording.records import StepRecord, unpack_steps
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.storage.files import DamagedFileError, load_tensors, read_json
from lightning_trak.storage.manifests import MANIFEST
from lightning_trak.storage.paths import local_directory
from lightning_trak.storage.schemas import anything, boolean, integer, items, record, sealed, sha256, text, versioned
from lightning_trak.storage.schemas import parameters as parameters_schema

FORMAT_VERSION = 2

_PARTS_KEPT = 3
_ADVICE = "restore it from a copy, or record the run again"

_count = integer(0, 1 << 62)
_environment = record({"first": _count}, others=anything)
_part = record(
    {
        "file": text(r"part-\d+-\d+\.safetensors"),
        "sha256": sha256,
        "first": _count,
        "stop": _count,
        "states": items(_count),
    }
)
_run = record(
    {
        "optimizer": text(),
        "precision": text(),
        "num_train": _count,
        "data": text(),
        "parameters": parameters_schema,
    }
)
_manifest = versioned(
    FORMAT_VERSION,
    sealed(
        {
            "format": _count,
            "id": text(r"[0-9a-f]{32}"),
            "writer": text(),
            "spacing": anything,
            "run": _run,
            "environments": items(_environment),
            "parts": items(_part),
            "finished": boolean,
        }
    ),
)


class _Part(NamedTuple):
    """The content of a file of steps and states."""

    tensors: dict[str, Tensor]
    layouts: list[Layout]
    records: list[StepRecord]


class Recording:
    """Reads the recording of a training run that :class:`~lightning_trak.TrainingRecorder` has made.

    Args:
        directory: the directory, on a disk.
        first_steps: how many steps are read, the first ones: as if the run had ended there. Default: all.

    Attributes:
        path: the directory.
        manifest: the content of its manifest.
        recorded_steps: the number of optimizer steps that are recorded.

    Raises:
        FileNotFoundError: if there is no recording.
        ValueError: if the manifest was altered, or has a format that this version cannot read.
    """

    def __init__(self, directory: str | os.PathLike[str], first_steps: int | None = None) -> None:
        self.path = local_directory(directory, "recording")
        self.manifest = read_manifest(self.path)
        self.recorded_steps = stop_of(self.manifest)
        self._first_steps = first_steps
        self._parts: dict[str, _Part] = {}

    @property
    def run(self) -> dict[str, Any]:
        """What the run trained: optimizer, precision, data and parameters."""
        found: dict[str, Any] = self.manifest["run"]
        return found

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps that are read."""
        return self.recorded_steps if self._first_steps is None else min(self._first_steps, self.recorded_steps)

    @property
    def state_steps(self) -> list[int]:
        """The steps before which there is a full state, in order. The last is that at the end, if all are read."""
        steps = {step for part in self.manifest["parts"] for step in part["states"]}
        return sorted(step for step in steps if step <= self.num_steps)

    def require_finished(self) -> None:
        """Check that the run has ended.

        Raises:
            ValueError: if it has not, or has no steps.
        """
        if not self.manifest["finished"] or not self.num_steps:
            raise ValueError(
                f'recording "{self.path}" holds {self.num_steps} steps of a run that has not ended; continue it with'
                " trainer.fit(ckpt_path=...) and the same TrainingRecorder, or train again into another directory"
            )

    def record(self, step: int) -> StepRecord:
        """The record of a step.

        Raises:
            FileNotFoundError: if its file is missing.
            ValueError: if the recording lacks the step, or the file was altered or replaced.
        """
        for part in self.manifest["parts"]:
            if part["first"] <= step < part["stop"]:
                found: StepRecord = self._load(part).records[step - part["first"]]
                if found.step == step:
                    return found
        raise ValueError(f'recording "{self.path}" lacks step {step}; {_ADVICE}')

    def state(self, step: int) -> TrainingState:
        """The full state before a step that :attr:`state_steps` names, on the CPU.

        Raises:
            FileNotFoundError: if its file is missing.
            ValueError: if the file was altered or replaced.
        """
        part = next(part for part in reversed(self.manifest["parts"]) if step in part["states"])
        content = self._load(part)
        return unpack_state(step, content.tensors, content.layouts)

    def _load(self, part: dict[str, Any]) -> _Part:
        """A part of the recording. The last few are kept, since their states and steps are read one after the other."""
        file = part["file"]
        if file not in self._parts:
            try:
                loaded = _read_part(self.path / file, part)
            except FileNotFoundError as error:
                raise FileNotFoundError(f'recording "{self.path}" lacks its file "{file}"; {_ADVICE}') from error
            except DamagedFileError as error:
                raise ValueError(f"{error}; {_ADVICE}") from error
            while len(self._parts) >= _PARTS_KEPT:
                del self._parts[next(iter(self._parts))]
            self._parts[file] = loaded
        return self._parts[file]


def _read_part(path: Path, part: dict[str, Any]) -> _Part:
    tensors, metadata = load_tensors(path)
    if metadata["sha256"] != part["sha256"]:
        raise DamagedFileError(path, "was replaced: it is not the file that the manifest names")
    try:
        layouts_schema("layouts", metadata.get("layouts"))
        records = unpack_steps(part["first"], tensors, metadata)
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        raise DamagedFileError(path, f"does not hold step records: {error}") from error
    return _Part(tensors, metadata["layouts"], records)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a recording, without its checksum.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it was altered, or has a format that this version cannot read.
    """
    try:
        manifest: dict[str, Any] = read_json(path / MANIFEST, _manifest)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'"{path}" is not a directory that TrainingRecorder has written: it has no {MANIFEST}; check the path, or'
            " train with callbacks=[TrainingRecorder(...)]"
        ) from error
    except DamagedFileError as error:
        raise ValueError(
            f'"{path / MANIFEST}" is not the manifest of a recording: it {error.reason}; restore it from a copy,'
            " or name a directory that TrainingRecorder has written"
        ) from error
    return {name: value for name, value in manifest.items() if name != "checksum"}


def stop_of(manifest: dict[str, Any]) -> int:
    """The number of steps that the parts of a manifest hold."""
    return max((part["stop"] for part in manifest.get("parts", ())), default=0)
