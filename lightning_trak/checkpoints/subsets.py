"""Which training examples a model has seen, as its weights file says it."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_trak.storage.files import tensor_digest
from lightning_trak.storage.schemas import integer, record, sha256, text

_MAX_EXAMPLES = 1 << 40


def _digest_or_none(field: str, value: Any) -> None:
    if value is not None:
        text()(field, value)


_SCHEMA = record(
    {
        "num_train": integer(1, _MAX_EXAMPLES),
        "bits": text(),
        "sha256": sha256,
        "data": _digest_or_none,
    }
)


@dataclass(frozen=True, eq=False)
class TrainingSubset:
    """The training examples that a model has seen.

    Attributes:
        mask: bool ``(num_train,)``, true where the model was trained on the example.
        data: digest of the whole training set, :func:`~lightning_trak.running.data.content.fingerprint`; None if unknown.
    """

    mask: Tensor
    data: str | None = None

    @property
    def digest(self) -> str:
        """A digest of the mask."""
        return tensor_digest({"mask": self.mask})

    def to_json(self) -> dict[str, Any]:
        """The subset in JSON's types: one bit an example, in base64."""
        bits = base64.b64encode(np.packbits(self.mask.cpu().numpy()).tobytes()).decode()
        return {"num_train": len(self.mask), "bits": bits, "sha256": self.digest, "data": self.data}

    @classmethod
    def from_json(cls, content: Any) -> TrainingSubset:
        """Read what :meth:`to_json` returned.

        Raises:
            ValueError: if it was altered. The error says how.
        """
        _SCHEMA("its training subset", content)
        size = content["num_train"]
        try:
            packed = np.frombuffer(base64.b64decode(content["bits"], validate=True), dtype=np.uint8)
        except binascii.Error as error:
            raise ValueError(f"the mask of its training subset is not base64: {error}") from error
        if len(packed) != -(-size // 8):
            raise ValueError(
                f"the mask of its training subset has {len(packed)} bytes, not one bit for {size} examples"
            )
        found = cls(torch.from_numpy(np.unpackbits(packed, count=size)).bool(), content["data"])
        if found.digest != content["sha256"]:
            raise ValueError("the mask of its training subset does not match its checksum")
        return found


def require_same_data(subset: TrainingSubset, num_train: int, data: str | None, name: str) -> None:
    """Check that a subset is one of this training set.

    Args:
        subset: the examples that a checkpoint's model has seen.
        num_train: size of the training set.
        data: its digest; None if unknown.
        name: of the checkpoint, for errors.

    Raises:
        ValueError: if it is a subset of other data.
    """
    if len(subset.mask) != num_train:
        raise ValueError(
            f"the model of {name} was trained on a subset of {len(subset.mask)} examples, but the training set has"
            f" {num_train}: give the whole training set of its fleet, in the same order"
        )
    if None not in (subset.data, data) and subset.data != data:
        raise ValueError(
            f"the model of {name} was trained on a subset of other data of this size; eight items were compared: give"
            " the whole training set of its fleet, in the same order and with the same collate function"
        )
