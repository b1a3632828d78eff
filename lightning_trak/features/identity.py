"""What a store of features depends on."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.checkpoints.copies import state_digest
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.fingerprints import difference, module_fingerprint
from lightning_trak.outputs import ModelOutput
from lightning_trak.storage.files import tensor_digest


class Contents:
    """The content of checkpoints. They are read once, at first use.

    Args:
        checkpoints: the checkpoints.
    """

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self._checkpoints = checkpoints

    @cached_property
    def _read(self) -> list[tuple[str, frozenset[str]]]:
        loaded = (checkpoint.load() for checkpoint in self._checkpoints)
        return [(tensor_digest(weights), frozenset(weights)) for weights in loaded]

    @property
    def digests(self) -> list[str]:
        """A digest of the weights of each checkpoint."""
        return [digest for digest, _ in self._read]

    @property
    def names(self) -> list[frozenset[str]]:
        """The names of the tensors in each checkpoint."""
        return [names for _, names in self._read]


def identity(model: ModelCopy, output: ModelOutput, settings: FeatureSettings, contents: Contents) -> dict[str, Any]:
    """Everything that features depend on, except the data and the Trainer's precision, as values for JSON.

    Args:
        model: the copy of the user's module.
        output: the output that is differentiated, as the user gave it.
        settings: how features are made.
        contents: the contents of the checkpoints.
    """
    shapes = {name: list(parameter.shape) for name, parameter in model.module.named_parameters()}
    preconditioners = [
        [item.kept_preconditioner().sha256] if settings.preconditioned else [] for item in model.checkpoints
    ]
    return {
        "seed": settings.seed,
        "dtype": settings.dtype.name,
        "projection": settings.projection.fingerprint(),
        "output": output.fingerprint(),
        "model": module_fingerprint(model.module, used_by=output),
        "parameters": [[name, shapes[raw]] for name, raw in model.names.items()],
        "preconditioned": True if settings.preconditioned else None,
        "checkpoints": [
            hashlib.sha256(" ".join([digest, state_digest(model.module, names), *also]).encode()).hexdigest()
            for digest, names, also in zip(contents.digests, contents.names, preconditioners, strict=True)
        ],
    }


def describe_difference(field: str, theirs: Any, mine: Any) -> tuple[str, str]:
    """Describe a field that differs between store and run: what the store was made with, and what the run has."""
    if field == "data":
        return "other training data of this size", "data that differ in some of eight items spread over the dataset"
    if field == "preconditioned":
        kinds = {None: "gradients as they are", True: "gradients multiplied by the optimizer's preconditioner"}
        return kinds[theirs], kinds[mine]
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
