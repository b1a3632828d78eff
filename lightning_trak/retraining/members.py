"""The members of a fleet on disk: each model's outputs at the targets, written once and whole.

    fleet/manifest.json                                     what every member depends on
    fleet/masks.safetensors                                 the subsets
    fleet/members/subset-00012-seed-001.safetensors         outputs of a model trained on subset 12, second repetition
    fleet/failures/subset-00012-seed-001.json               how often its training failed, and the last traceback

A member exists under its own name only when it is complete. Its name and content depend on the manifest alone, so any
number of processes and machines can share out the missing ones; directories filled on disks apart are merged by copying
the files of ``members`` together.
"""

import json
import re
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.files import load_tensors, read_manifest, save_tensors, tensor_digest, write_json
from lightning_trak.fingerprints import are_same, changes

FORMAT_VERSION = 2


class Member(NamedTuple):
    """One model of a fleet.

    Attributes:
        subset: what it is trained on: a row of the masks.
        repetition: which of the models that are trained on this subset.
    """

    subset: int
    repetition: int

    def __str__(self) -> str:
        return f"subset {self.subset}, repetition {self.repetition}"

    @property
    def stem(self) -> str:
        """Name of its files."""
        return f"subset-{self.subset:05d}-seed-{self.repetition:03d}"


class Retrained(NamedTuple):
    """What a fleet found.

    Attributes:
        masks: bool ``(num_subsets, num_train)``, the subsets.
        outputs: float32 ``(num_targets, num_subsets, num_seeds)``.
    """

    masks: Tensor
    outputs: Tensor


class MemberStore:
    """The members of one fleet.

    Args:
        directory: a local or mounted directory; made on first use.
        identity: everything that members depend on beside the masks, as JSON-able values. Members that exist must have
            been made with the same.
        masks: bool ``(num_subsets, num_train)``.

    Raises:
        ValueError: if the directory holds members of another identity, naming the first difference.
    """

    def __init__(self, directory: str | Path, identity: dict[str, Any], masks: Tensor) -> None:
        self.directory = Path(directory).expanduser()
        self.masks = masks
        wanted: dict[str, Any] = json.loads(json.dumps(identity | {"masks": tensor_digest({"masks": masks})}))
        path = self.directory / "manifest.json"
        if path.exists() and not are_same(_read_manifest(directory)["identity"], wanted) and not self.finished():
            path.unlink(missing_ok=True)  # of a run without a single member, over a mistake that has been mended since
            for failure in (self.directory / "failures").glob("*.json"):
                failure.unlink(missing_ok=True)
        if not path.exists():
            if self.finished():
                raise ValueError(f'"{directory}" holds members of a fleet but no manifest.json; use another directory')
            with suppress(FileExistsError):  # another process was faster: its manifest counts
                write_json(path, {"format": FORMAT_VERSION, "identity": wanted}, replace=False)
        self._manifest = _read_manifest(directory)
        self._compare(self._manifest["identity"], wanted)
        if not (self.directory / "masks.safetensors").exists():
            save_tensors(self.directory / "masks.safetensors", {"masks": masks})

    def _compare(self, stored: dict[str, Any], wanted: dict[str, Any]) -> None:
        for field, mine in wanted.items():
            theirs = stored.get(field)
            if are_same(mine, theirs):
                continue
            if field == "masks":
                made, have = "other subsets", f"subsets of the same shape {tuple(self.masks.shape)}"
            elif field in ("train", "targets"):
                made, have = f"other {field} data of this size", "data that differ in eight items spread over them"
            elif field == "parameters":
                ours, others = dict(mine), dict(theirs or [])
                differing = [name for name in ours | others if ours.get(name) != others.get(name)]
                made, have = "a module of other parameters", f"one that differs in {', '.join(differing[:5])}"
            elif isinstance(mine, dict) and isinstance(theirs, dict):
                made, have = f"another {field}", f"one that differs: {changes(theirs, mine)}"
            else:
                made, have = f"{field} {theirs}", f"{field} {mine}"
            raise ValueError(
                f'fleet "{self.directory}" was made with {made}, this one has {have}; use another directory or the same'
                f" {field}"
            )

    def finished(self) -> set[Member]:
        """Members that are on disk."""
        found = (
            re.fullmatch(r"subset-(\d+)-seed-(\d+)\.safetensors", path.name)
            for path in self.directory.glob("members/*.safetensors")
        )
        return {Member(int(match[1]), int(match[2])) for match in found if match}

    def __contains__(self, member: Member) -> bool:
        return self._path(member).exists()

    def write(self, member: Member, outputs: Tensor, record: dict[str, Any]) -> None:
        """Write a complete member.

        Args:
            member: which.
            outputs: shape ``(num_targets,)``.
            record: of its training, as JSON-able values.

        Raises:
            RuntimeError: if another run has replaced the manifest since this object was made.
        """
        if _read_manifest(self.directory) != self._manifest:
            raise RuntimeError(f'another run has taken fleet "{self.directory}" over; give each run a directory')
        save_tensors(self._path(member), {"outputs": outputs.float()}, **record)

    def _path(self, member: Member) -> Path:
        return self.directory / "members" / f"{member.stem}.safetensors"

    def read(self, member: Member) -> tuple[Tensor, dict[str, Any]]:
        """A member's outputs ``(num_targets,)`` and the record of its training.

        Raises:
            ValueError: if the file is truncated or altered.
        """
        path = self._path(member)
        try:
            tensors, record = load_tensors(path)
        except ValueError as error:
            raise ValueError(
                f'"{path}" is truncated or altered ({error}); delete it and run the fleet again'
            ) from error
        outputs = tensors["outputs"]
        if len(outputs) != self._manifest["identity"]["num_targets"]:
            raise ValueError(f'"{path}" has outputs at {len(outputs)} targets; delete it and run the fleet again')
        return outputs, record

    def outputs(self, num_seeds: int) -> Tensor:
        """The outputs of all members, float32 ``(num_targets, num_subsets, num_seeds)``.

        Raises:
            RuntimeError: if members are missing, naming them, and which of them failed.
        """
        wanted = [Member(subset, seed) for seed in range(num_seeds) for subset in range(len(self.masks))]
        finished = self.finished()
        missing = [member for member in wanted if member not in finished]
        if missing:
            raise RuntimeError(
                f'fleet "{self.directory}" lacks {len(missing)} of {len(wanted)} members; run it to train them:'
                f" {self.describe(missing)}"
            )
        num_targets = self._manifest["identity"]["num_targets"]
        outputs = torch.empty(num_targets, len(self.masks), num_seeds)
        for member in wanted:
            outputs[:, member.subset, member.repetition] = self.read(member)[0]
        return outputs

    def record_failure(self, member: Member, error: Exception) -> None:
        """Note that a member's training failed, beside how often it has."""
        content = {
            "attempts": self.failure(member).get("attempts", 0) + 1,
            "error": f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_json(self._failure_path(member), content)

    def failure(self, member: Member) -> dict[str, Any]:
        """``attempts``, ``error`` and ``traceback`` if a member has ever failed, else nothing."""
        path = self._failure_path(member)
        content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return content

    def _failure_path(self, member: Member) -> Path:
        return self.directory / "failures" / f"{member.stem}.json"

    def describe(self, members: Sequence[Member]) -> str:
        """Members for an error message, each with its failure; those that failed come first, and the first few do."""
        failures = {member: self.failure(member) for member in members}
        ordered = sorted(members, key=lambda member: not failures[member])
        named = [
            f"{member} (failed {failures[member]['attempts']}x, {failures[member]['error']})"
            if failures[member]
            else str(member)
            for member in ordered[:5]
        ]
        return "; ".join(named) + (f"; and {len(members) - 5} more" if len(members) > 5 else "")


def read_fleet(directory: str | Path) -> Retrained:
    """The subsets and outputs of a fleet that has run, without what trained it.

    Args:
        directory: of the fleet, with all members of the last repetition that it was run for.

    Raises:
        FileNotFoundError: if there is no fleet.
        RuntimeError: if members are missing.
        ValueError: if a file is truncated or altered.
    """
    identity = _read_manifest(directory)["identity"]
    path = Path(directory).expanduser() / "masks.safetensors"
    try:
        tensors, _ = load_tensors(path)
    except ValueError as error:
        raise ValueError(f'"{path}" is truncated or altered ({error}); run the fleet again to restore it') from error
    store = MemberStore(directory, identity, tensors["masks"])
    num_seeds = 1 + max((member.repetition for member in store.finished()), default=0)
    return Retrained(store.masks, store.outputs(num_seeds))


def _read_manifest(directory: str | Path) -> dict[str, Any]:
    return read_manifest(directory, "fleet", FORMAT_VERSION, "run it first")
