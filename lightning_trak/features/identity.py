"""What a store of features depends on."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.checkpoints.copies import state_digest
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.fingerprints import difference, module_fingerprint
from lightning_trak.outputs import ModelOutput
from lightning_trak.storage.files import tensor_digest


class Content(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        digest: of its weights.
        names: of its tensors.
    """

    digest: str
    names: frozenset[str]


class Contents:
    """The contents of checkpoints. Each is read once, at first use; live ones are read at each use.

    Args:
        checkpoints: the checkpoints.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints
        self._known: dict[int, Content] = {}

    def read(self) -> list[Content]:
        """The content of each checkpoint."""
        for number, checkpoint in enumerate(self._checkpoints):
            if checkpoint.live or number not in self._known:
                weights = checkpoint.load()
                self._known[number] = Content(tensor_digest(weights), frozenset(weights))
        return [self._known[number] for number in range(len(self._checkpoints))]


def identity(model: ModelCopy, output: ModelOutput, settings: FeatureSettings, contents: Contents) -> dict[str, Any]:
    """Everything that features depend on, except the data and the Trainer's precision, as values for JSON.

    Args:
        model: the copy of the user's module.
        output: the output that is differentiated, as the user gave it.
        settings: how features are made.
        contents: the contents of the checkpoints.
    """
    shapes = {name: list(parameter.shape) for name, parameter in model.module.named_parameters()}
    return {
        "seed": settings.seed,
        "dtype": settings.dtype.name,
        "projection": settings.projection.fingerprint(),
        "output": output.fingerprint(),
        "model": module_fingerprint(model.module, used_by=output),
        "parameters": [[name, shapes[raw]] for name, raw in model.names.items()],
        "checkpoints": [
            hashlib.sha256(f"{content.digest} {state_digest(model.module, content.names)}".encode()).hexdigest()
            for content in contents.read()
        ],
    }


def describe_difference(field: str, theirs: Any, mine: Any) -> tuple[str, str]:
    """Describe a field that differs between store and run: what the store was made with, and what the run has."""
    if field == "data":
        return "other training data of this size", "data that differ in some of eight items spread over the dataset"
    if field == "checkpoints" and isinstance(theirs, list) and len(theirs) == len(mine):
        number = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
        return f"other weights or buffers at checkpoint {number}", "the same number of checkpoints"
    if field in ("checkpoints", "parameters") and isinstance(theirs, list):
        made, have = f"{len(theirs)} {field}", f"{len(mine)}"
        differing = [item[0] for item in [*mine, *theirs] if (item in mine) != (item in theirs)]
        if field == "parameters":
            have += f" (differing in {', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''})"
        return made, have
    return difference(field, theirs, mine)
