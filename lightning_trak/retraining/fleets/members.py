"""The members of a fleet on disk: the outputs of each model at the targets.

    fleet/manifest.json                                     what every member depends on
    fleet/masks.safetensors                                 the subsets
    fleet/members/subset-00012-seed-001.safetensors         outputs of a model trained on subset 12, second repetition
    fleet/weights/subset-00012-seed-001.safetensors         its final weights, if the fleet keeps weights
    fleet/failures/subset-00012-seed-001.json               how often its training failed, and the last traceback

A file of a member has its name only when it is complete. Name and content depend only on the manifest. So any number of
processes and machines can share the missing members. To merge directories of different machines, copy the files of
their ``members`` and ``weights`` folders together. Each file of a member's outputs has a header that names its member
and its fleet.

The weights of a member are written before its outputs, whose header has the checksum of the weights. So a process that
is killed leaves no outputs without the weights that gave them. The header of the weights holds the member's subset, so
that attribution methods know which training examples the model has seen.
"""

import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.checkpoints.weights import read_about, without_extra_state, write_safetensors
from lightning_trak.fingerprints import changes, difference
from lightning_trak.storage.claims import ClaimedDirectory
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
from lightning_trak.storage.manifests import DirectoryKind
from lightning_trak.storage.schemas import anything, are_same, integer, parameters, record, sealed, sha256, text

FORMAT_VERSION = 2

_COUNT = integer(1, 1 << 40)
_SEALED = sealed(
    {
        "format": integer(FORMAT_VERSION, FORMAT_VERSION),
        "identity": record(
            {"num_targets": _COUNT, "masks": sha256},
            optional={"num_subsets": _COUNT, "num_train": _COUNT, "parameters": parameters},
            others=anything,
        ),
    }
)


def _manifest(field: str, value: Any) -> None:
    _SEALED(field, value)  # a function with a name, so that a MemberStore can be pickled


KIND = DirectoryKind(
    name="fleet",
    short_name="fleet",
    version=FORMAT_VERSION,
    schema=_manifest,
    advice="run it first",
    folders=("members", "weights", "failures"),
    results="members/subset-*-seed-*.safetensors",
    results_name="members of a fleet",
    remains=("failures/*.json", "weights/subset-*-seed-*.safetensors"),
    files=(
        r"masks\.safetensors",
        r"(members|weights)/subset-\d{5,}-seed-\d{3,}\.safetensors",
        r"failures/subset-\d{5,}-seed-\d{3,}\.json",
    ),
)
_NUM_NAMED = 5  # members in a message
_FAILURE = record({"attempts": _COUNT, "error": text(), "traceback": text()})


class Member(NamedTuple):
    """One model of a fleet.

    Attributes:
        subset: the subset that it is trained on: a row index of the masks.
        repetition: its index among the models that are trained on this subset.
    """

    subset: int
    repetition: int

    def __str__(self) -> str:
        return f"subset {self.subset}, repetition {self.repetition}"

    @property
    def stem(self) -> str:
        """The name of its files, without suffix."""
        return f"subset-{self.subset:05d}-seed-{self.repetition:03d}"


def not_finite(outputs: Tensor) -> ValueError | None:
    """The error of a member whose outputs are not all finite in float32, as they are stored; None if they are."""
    bad = (~outputs.float().isfinite()).nonzero().flatten().tolist()
    return ValueError(f"the output is not finite at {len(bad)} targets, target {bad[0]} first") if bad else None


class MemberStore:
    """The members of one fleet.

    Args:
        directory: a local or mounted directory. It is made on first use.
        identity: everything that members depend on, other than the masks, in JSON's types. Existing members must have
            the same identity.
        masks: the subsets, bool ``(num_subsets, num_train)``.
        read_only: the fleet must exist, and no file is changed.
        keeps_weights: whether a member is complete only when its weights are there, too.
        overwrite: whether to delete the members of a fleet with another identity.

    Raises:
        FileNotFoundError: if ``read_only`` is true and there is no fleet.
        NotADirectoryError: if there is something else in the place of the directory.
        ValueError: if the directory has members with another identity (the error names the first difference), or if its
            manifest is damaged.
    """

    def __init__(
        self,
        directory: str | Path,
        identity: dict[str, Any],
        masks: Tensor,
        read_only: bool = False,
        keeps_weights: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.masks = masks
        self._keeps_weights = keeps_weights
        digest = tensor_digest({"masks": masks})
        content = {"identity": identity | {"masks": digest}}
        self._directory = ClaimedDirectory(
            directory, KIND, content, self._difference, "one", read_only, overwrite=overwrite
        )
        self.directory, self.key = self._directory.path, self._directory.key
        if not read_only:
            self._keep_masks(self.directory / "masks.safetensors", digest)

    def _keep_masks(self, path: Path, digest: str) -> None:
        with suppress(FileNotFoundError, DamagedFileError):
            if load_tensors(path)[1]["sha256"] == digest:
                return
        save_tensors(path, {"masks": self.masks})

    def _difference(self, field: str, theirs: Any, mine: Any) -> tuple[str, str]:
        """Two texts about a field that differs: what the fleet on disk has, and what this fleet has."""
        if field == "masks":
            return "other subsets", f"subsets of the same shape {tuple(self.masks.shape)}"
        if field in ("train", "targets"):
            return f"other {field} data of this size", "data that differ; eight items were compared"
        if field == "parameters":
            ours, others = dict(mine), dict(theirs or [])
            differing = [name for name in ours | others if ours.get(name) != others.get(name)]
            return "a module of other parameters", f"one that differs in {', '.join(differing[:5])}"
        return difference(field, theirs, mine)

    def finished(self) -> set[Member]:
        """The members that are on disk."""
        return self._named("members", ".safetensors")

    def _named(self, folder: str, suffix: str) -> set[Member]:
        """The members that have files in a folder. Other files are ignored."""
        names = [path.name for path in (self.directory / folder).glob(f"*{suffix}")]
        matches = (re.fullmatch(rf"subset-(\d+)-seed-(\d+){re.escape(suffix)}", name) for name in names)
        members = {Member(int(match[1]), int(match[2])) for match in matches if match}
        return {member for member in members if f"{member.stem}{suffix}" in names}

    def __contains__(self, member: Member) -> bool:
        """Whether a member is complete. Outputs from a run that kept no weights are not, if this run keeps them."""
        if not self._path(member).exists() or not self._keeps_weights:
            return self._path(member).exists()
        with suppress(DamagedFileError):
            return self._weights_path(member).exists() and "weights" in load_metadata(self._path(member))
        return True  # reading it raises the error that says what to do

    def missing(self, members: Iterable[Member]) -> list[Member]:
        """Those of some members that are not complete."""
        return [member for member in members if member not in self]

    def require_trained(self, members: Sequence[Member]) -> None:
        """Check that the training of some members has not failed.

        Raises:
            RuntimeError: if some are not complete. The error names a few, those that failed first.
        """
        missing = self.missing(members)
        if missing:
            failed = self._failed()
            named = self._describe(sorted(missing, key=lambda member: (member not in failed, member)), len(missing))
            raise RuntimeError(
                f"{len(missing)} of {len(members)} members failed, all others are finished: {named}. See their"
                f' tracebacks in "{self.directory}/failures", and run again to retry'
            )

    def write(
        self,
        member: Member,
        outputs: Tensor,
        record: dict[str, Any],
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a complete member.

        Args:
            member: the member.
            outputs: its outputs, shape ``(num_targets,)``.
            record: a record of its training, in JSON's types.
            weights: its state dict after training; None if it is not kept.

        Raises:
            RuntimeError: if a later run of this process has claimed the directory, or if the manifest was changed.
            TypeError: if an entry of the state dict is not a dense tensor.
        """
        self._directory.require_unchanged()
        if weights is not None:
            data = self._directory.manifest["identity"].get("train")
            subset = TrainingSubset(self.masks[member.subset], data)
            tensors = without_extra_state(weights, f"the state dict of {member}")
            record = record | {"weights": write_safetensors(self._weights_path(member), tensors, subset)}
        save_tensors(self._path(member), {"outputs": outputs.float()}, fleet=self.key, member=member.stem, **record)

    def _path(self, member: Member) -> Path:
        return self.directory / "members" / f"{member.stem}.safetensors"

    def _weights_path(self, member: Member) -> Path:
        return self.directory / "weights" / f"{member.stem}.safetensors"

    def weights(self, member: Member) -> Path:
        """The file of a member's final weights.

        Raises:
            FileNotFoundError: if its weights were not kept.
            ValueError: if the file does not belong to its outputs, or its header is damaged.
        """
        path = self._weights_path(member)
        digest = self.read(member)[1].get("weights")
        if digest is None or not path.exists():
            raise FileNotFoundError(
                f'fleet "{self.directory}" has not kept the weights of {member}; run it with keep_weights=True, which'
                " trains this member again"
            )
        try:
            found, subset = read_about(str(path))
            if found != digest or subset is None or not torch.equal(subset.mask, self.masks[member.subset]):
                raise ValueError("its header is of other weights")
        except ValueError as error:
            raise ValueError(
                f'"{path}" is damaged, or does not hold the weights that gave the outputs of {member}; delete it and'
                " run the fleet again with keep_weights=True"
            ) from error
        return path

    def read(self, member: Member) -> tuple[Tensor, dict[str, Any]]:
        """A member's outputs ``(num_targets,)`` and the record of its training.

        Raises:
            ValueError: if the file is truncated or altered.
        """
        path = self._path(member)
        try:
            tensors, record = load_tensors(path)
            self._require_member(path, tensors, record)
        except DamagedFileError as error:
            raise ValueError(f"{error}; delete it and run the fleet again") from error
        return tensors["outputs"], record

    def _require_member(self, path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Check that a file holds the member of its name, and is not a file of another member or fleet."""
        identity = self._directory.manifest["identity"]
        theirs, mine = record.get("environment"), identity.get("environment")
        if "environment" in record and not are_same(theirs, mine):
            raise DamagedFileError(
                path, f"was made on other hardware or by another version than this fleet: {changes(mine, theirs)}"
            )
        if (record.get("fleet"), record.get("member")) != (self.key, path.stem):
            fleet = "this fleet" if record.get("fleet") == self.key else "another fleet"
            raise DamagedFileError(path, f"holds {record.get('member')} of {fleet}")
        outputs, shape = tensors.get("outputs"), (identity["num_targets"],)
        if outputs is None or outputs.shape != shape or outputs.dtype != torch.float32 or not outputs.isfinite().all():
            raise altered(path, f"it should hold finite outputs, float32 of shape {shape}")

    def outputs(self, num_seeds: int) -> Tensor:
        """The outputs of all members, float32 ``(num_targets, num_subsets, num_seeds)``.

        Raises:
            RuntimeError: if members are missing. The error names some of them, those that failed first.
            ValueError: if a file is truncated or altered.
        """

        def wanted() -> Iterable[Member]:
            return (Member(subset, seed) for seed in range(num_seeds) for subset in range(len(self.masks)))

        def is_wanted(member: Member) -> bool:
            return member.subset < len(self.masks) and member.repetition < num_seeds

        count, finished = len(self.masks) * num_seeds, {member for member in self.finished() if is_wanted(member)}
        if len(finished) < count:  # after a wrong file name, very many may be missing
            failed = filter(is_wanted, sorted(self._failed()))
            missing = (member for member in chain(failed, wanted()) if member not in finished)
            first = list(dict.fromkeys(islice(missing, 2 * _NUM_NAMED)))  # a failed member comes twice
            raise RuntimeError(
                f'fleet "{self.directory}" lacks {count - len(finished)} of {count} members; run it to train them:'
                f" {self._describe(first, count - len(finished))}"
            )
        first_outputs = self.read(Member(0, 0))[0]
        outputs = torch.empty(len(first_outputs), len(self.masks), num_seeds)
        for member in wanted():
            outputs[:, member.subset, member.repetition] = self.read(member)[0]
        return outputs

    def record_failure(self, member: Member, error: Exception) -> None:
        """Write a note that a member's training failed: how often so far, and the last error."""
        attempts = 0
        with suppress(DamagedFileError):
            attempts = self.failure(member).get("attempts", 0)
        content = {
            "attempts": attempts + 1,
            "error": f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        write_json(self._failure_path(member), content)

    def failure(self, member: Member) -> dict[str, Any]:
        """The note of a member's failures: ``attempts``, ``error`` and ``traceback``. It is empty if none failed.

        Raises:
            DamagedFileError: if the note is truncated or altered.
        """
        path = self._failure_path(member)
        content: dict[str, Any] = read_json(path, _FAILURE) if path.exists() else {}
        return content

    def _failed(self) -> set[Member]:
        return self._named("failures", ".json")

    def _failure_path(self, member: Member) -> Path:
        return self.directory / "failures" / f"{member.stem}.json"

    def _describe(self, members: Sequence[Member], count: int) -> str:
        """The first few members as text for an error message, each with its failure."""
        named = "; ".join(map(self._with_failure, members[:_NUM_NAMED]))
        return named + (f"; and {count - _NUM_NAMED} more" if count > _NUM_NAMED else "")

    def _with_failure(self, member: Member) -> str:
        try:
            failure = self.failure(member)
        except DamagedFileError as error:
            return f"{member} (failed, but the note of it {error})"
        return f"{member} (failed {failure['attempts']}x, {failure['error']})" if failure else str(member)
