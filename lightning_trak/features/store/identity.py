"""What a store of features depends on."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.checkpoints.digests import state_digest, weights_digest
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.features.store.growth import describe_data
from lightning_trak.fingerprints import difference, module_fingerprint
from lightning_trak.outputs import ModelOutput
from lightning_trak.texts.messages import listed


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
                self._known[number] = Content(weights_digest(weights), frozenset(weights))
        return [self._known[number] for number in range(len(self._checkpoints))]


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
        "dtype": settings.stored_dtype(settings.dim(model.shapes)).name,
        "projection": settings.projection.fingerprint(),
        "output": output.fingerprint(),
        "model": module_fingerprint(model.module, used_by=output),
        "parameters": [[name, shapes[raw]] for name, raw in model.names.items()],
        "preconditioned": settings.preconditioned,
        "checkpoints": [
            _key(checkpoint, content, model, settings)
            for checkpoint, content in zip(model.checkpoints, contents.read(), strict=True)
        ],
    }


def _key(checkpoint: Checkpoint, content: Content, model: ModelCopy, settings: FeatureSettings) -> str:
    """A digest of what features depend on at one checkpoint alone."""
    parts = [content.digest, state_digest(model.module, content.names)]
    if settings.preconditioned:
        parts.append(checkpoint.kept_preconditioner().sha256)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def describe_difference(field: str, theirs: Any, mine: Any) -> tuple[str, str]:
    """Describe a field that differs between store and run: what the store was made with, and what the run has."""
    if field == "data":
        return describe_data(theirs, mine)
    if field == "preconditioned":
        made, have = (
            "gradients multiplied by the optimizer's preconditioner" if found else "gradients as they are"
            for found in (theirs, mine)
        )
        return made, have
    if field == "parameters" and isinstance(theirs, list):
        differing = [item[0] for item in [*mine, *theirs] if (item in mine) != (item in theirs)]
        return f"{len(theirs)} parameters", f"{len(mine)} (differing in {listed(differing, 5)})"
    return difference(field, theirs, mine)
