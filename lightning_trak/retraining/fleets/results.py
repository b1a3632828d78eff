"""The results of a fleet that has run, read from its directory."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.retraining.fleets.members import KIND, Member, MemberStore
from lightning_trak.storage.files import DamagedFileError, load_tensors
from lightning_trak.storage.manifests import read_manifest
from lightning_trak.storage.paths import local_directory
from lightning_trak.texts.display import tuple_line


class Retrained(NamedTuple):
    """The results of a fleet.

    Attributes:
        masks: the subsets, bool ``(num_subsets, num_train)``.
        outputs: outputs of the models, float32 ``(num_targets, num_subsets, num_seeds)``.
    """

    masks: Tensor
    outputs: Tensor

    def __repr__(self) -> str:
        return tuple_line(self)


def read_fleet(directory: str | Path) -> Retrained:
    """Read the subsets and outputs of a fleet that has run. Models, Trainers and data are not needed.

    Args:
        directory: the directory of the fleet, with all members up to its last repetition.

    Raises:
        FileNotFoundError: if there is no fleet.
        RuntimeError: if members are missing.
        ValueError: if a file is truncated or altered.
    """
    store, outputs = open_fleet(directory)
    return Retrained(store.masks, outputs)


def open_fleet(directory: str | Path) -> tuple[MemberStore, Tensor]:
    """The members of a fleet that has run, for reading, and their outputs: see :func:`read_fleet`."""
    identity = read_manifest(directory, KIND)["identity"]
    store = MemberStore(directory, identity, _read_masks(directory, identity), read_only=True)
    finished = store.finished()
    last = max(finished, key=lambda member: member.repetition, default=Member(0, 0))
    if last.repetition >= max(1, len(finished)):
        raise RuntimeError(
            f'"{store.directory}/members" has a file of repetition {last.repetition}, {last.stem}.safetensors, but only'
            f" {len(finished)} members in all; remove it if it does not belong to the fleet, or train all members"
        )
    return store, store.outputs(last.repetition + 1)


def _read_masks(directory: str | Path, identity: dict[str, Any]) -> Tensor:
    path = local_directory(directory, "fleet") / "masks.safetensors"
    advice = "run the fleet again to restore it"
    try:
        tensors, metadata = load_tensors(path)
        masks = tensors.get("masks")
        if masks is None or masks.dtype != torch.bool or masks.ndim != 2 or metadata["sha256"] != identity["masks"]:
            raise DamagedFileError(path, "holds masks that are not those of the manifest")
    except FileNotFoundError as error:
        raise FileNotFoundError(f'there is no "{path}"; {advice}') from error
    except DamagedFileError as error:
        raise ValueError(f"{error}; {advice}") from error
    return masks
