"""The manifest of a series of snapshots: what it says, and how it is checked when it is read."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning_trak.storage.schemas import (
    integer,
    items,
    parse_json,
    record,
    sealed,
    sha256,
    text,
    versioned,
    with_checksum,
)

FORMAT_VERSION = 3


@dataclass(frozen=True)
class ParameterGroup:
    """The settings of one parameter group of an optimizer in the last step before a snapshot.

    Attributes:
        optimizer: position in ``trainer.optimizers``.
        algorithm: class name of the optimizer. How the weight decay is applied follows from it.
        lr: learning rate, or None if the optimizer has no such setting.
        weight_decay: weight decay, or None if the optimizer has no such setting.
        parameters: names of the group's parameters, as far as the module has them.
    """

    optimizer: int
    algorithm: str
    lr: float | None
    weight_decay: float | None
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file that belongs to a snapshot.

    Attributes:
        file: its name in the directory.
        size: of the file, in bytes.
        sha256: checksum of its tensors, :func:`~lightning_trak.storage.files.tensor_digest`.
    """

    file: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Snapshot(TensorFile):
    """An entry of the manifest: the file of the state dict, and what belongs to it.

    Attributes:
        step: optimizer steps taken, as ``trainer.global_step`` counts them (over all optimizers).
        epoch: training epochs completed.
        parameter_groups: settings of each parameter group of each optimizer.
        preconditioner: the file of what the optimizer multiplies gradients by; None if it was not kept.
        frozen: checksum of the parameters that the snapshot leaves out because training does not change them,
            :func:`~lightning_trak.checkpoints.digests.frozen_digest`; None if it has all.
    """

    step: int
    epoch: int
    parameter_groups: tuple[ParameterGroup, ...]
    preconditioner: TensorFile | None = None
    frozen: str | None = None

    @property
    def files(self) -> list[str]:
        """The names of its files."""
        return [self.file] if self.preconditioner is None else [self.file, self.preconditioner.file]


@dataclass(frozen=True)
class Manifest:
    """What a directory of snapshots holds.

    Attributes:
        run: identifier of the training run, kept when the run is resumed.
        writer: identifier of the writing process, a new one each time that the run is resumed.
        snapshots: the snapshots, in the order of their steps.
    """

    run: str
    writer: str
    snapshots: tuple[Snapshot, ...]

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """Read what :meth:`to_json` gave, as the bytes of a file.

        Raises:
            ValueError: if it is no manifest, was altered, or has a format that this version cannot read.
        """
        manifest = parse_json(content, _manifest)
        return cls(manifest["run"], manifest["writer"], tuple(_parse(entry) for entry in manifest["snapshots"]))

    def to_json(self) -> dict[str, Any]:
        """The manifest in JSON's types, with its checksum.

        Raises:
            ValueError: if it could not be read again.
        """
        fields = asdict(self)
        fields["snapshots"] = [
            {name: value for name, value in entry.items() if value is not None} for entry in fields["snapshots"]
        ]
        content = with_checksum({"format": FORMAT_VERSION, **fields})
        parse_json(json.dumps(content).encode(), _manifest)
        return content


def file_name(step: int) -> str:
    """The name of the file of a snapshot."""
    return f"snapshot-{step:08d}.safetensors"


def preconditioner_name(step: int) -> str:
    """The name of the file of what the optimizer multiplies gradients by."""
    return f"preconditioner-{step:08d}.safetensors"


def _number(field: str, value: Any) -> None:
    finite = (type(value) is int and abs(value) < 1 << 1000) or (type(value) is float and math.isfinite(value))
    if value is not None and not finite:
        raise ValueError(f"{field} must be a number or null, got {value!r:.40}")


_count = integer(0, (1 << 63) - 1)
_name = text(r"\S+", "a name")
_group = record(
    {"optimizer": _count, "algorithm": _name, "lr": _number, "weight_decay": _number, "parameters": items(text())}
)
_entries = items(
    record(
        {
            "file": _name,
            "size": _count,
            "sha256": sha256,
            "step": _count,
            "epoch": _count,
            "parameter_groups": items(_group),
        },
        optional={
            "preconditioner": record({"file": _name, "size": _count, "sha256": sha256}),
            "frozen": sha256,
        },
    )
)


def _snapshots(field: str, value: Any) -> None:
    _entries(field, value)
    for number, entry in enumerate(value):
        if number and entry["step"] <= value[number - 1]["step"]:
            raise ValueError(
                f"{field}[{number}].step must be greater than {value[number - 1]['step']}, the step of the snapshot"
                f" before it, got {entry['step']}"
            )
        _require_name(f"{field}[{number}]", entry["file"], file_name(entry["step"]))
        if "preconditioner" in entry:
            found = entry["preconditioner"]["file"]
            _require_name(f"{field}[{number}].preconditioner", found, preconditioner_name(entry["step"]))


def _require_name(field: str, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{field}.file must be {expected!r}, which follows from its step, got {found!r:.80}")


_manifest = versioned(
    FORMAT_VERSION, sealed({"format": _count, "run": _name, "writer": _name, "snapshots": _snapshots})
)


def _parse(entry: dict[str, Any]) -> Snapshot:
    groups = tuple(
        ParameterGroup(**(group | {"parameters": tuple(group["parameters"])})) for group in entry["parameter_groups"]
    )
    also = entry.get("preconditioner")
    return Snapshot(
        **(entry | {"parameter_groups": groups, "preconditioner": None if also is None else TensorFile(**also)})
    )
