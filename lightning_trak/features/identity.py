"""What a store of features depends on."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.checkpoints.copies import state_digest
from lightning_trak.checkpoints.names import weights_digest
from lightning_trak.features.growth import describe_data
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.fingerprints import difference, module_fingerprint
from lightning_trak.outputs import ModelOutput


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
        return [(weights_digest(weights), frozenset(weights)) for weights in loaded]

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

    The features of each checkpoint depend on its own entry in ``"checkpoints"`` and on all else.

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
            hashlib.sha256(f"{digest} {state_digest(model.module, names)}".encode()).hexdigest()
            for digest, names in zip(contents.digests, contents.names, strict=True)
        ],
    }


def describe_difference(field: str, theirs: Any, mine: Any) -> tuple[str, str]:
    """Describe a field that differs between store and run: what the store was made with, and what the run has."""
    if field == "data":
        return describe_data(theirs, mine)
    if field == "parameters" and isinstance(theirs, list):
        differing = [item[0] for item in [*mine, *theirs] if (item in mine) != (item in theirs)]
        names = f"{', '.join(differing[:5])}{', ...' if len(differing) > 5 else ''}"
        return f"{len(theirs)} parameters", f"{len(mine)} (differing in {names})"
    return difference(field, theirs, mine)
