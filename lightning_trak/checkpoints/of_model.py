"""The checkpoints of a given model, with weights under the model's own names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.checkpoints.formats import state_dict
from lightning_trak.checkpoints.names import canonical_name
from lightning_trak.checkpoints.reading import CheckpointsLike, resolve_checkpoints

CURRENT = "the model's current weights"


def checkpoints_of(
    model: nn.Module, checkpoints: CheckpointsLike | None, weights_only: bool = True
) -> list[Checkpoint]:
    """Find the checkpoints that a user names for a model.

    Args:
        model: the user's model.
        checkpoints: as for :func:`~lightning_trak.checkpoints.reading.resolve_checkpoints`. None: the weights that the
            model has whenever they are read.
        weights_only: as there.

    Returns:
        At least one checkpoint. Weights that were saved of a part of the model have the part's name in front: those of
        ``self.model`` begin with ``model.``.
    """
    if checkpoints is None:
        return [Checkpoint(CURRENT, partial(_current, model), live=True)]
    found = resolve_checkpoints(checkpoints, weights_only)
    # What TRAKCallback saves is the whole model, under its own names.
    return [
        checkpoint
        if checkpoint.record
        else replace(checkpoint, read=partial(_under_own_names, checkpoint.name, checkpoint.read, model))
        for checkpoint in found
    ]


def _current(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's weights, which later training does not change."""
    return {name: tensor.cpu().clone() for name, tensor in state_dict(model.state_dict(), CURRENT).items()}


def _under_own_names(name: str, read: Callable[[], dict[str, Tensor]], model: nn.Module) -> dict[str, Tensor]:
    """Read weights, and give them the names that they have in the model.

    Raises:
        ValueError: if they may be those of several parts of the model.
    """
    weights = read()
    own: dict[str, Any] = {canonical_name(key): value for key, value in model.state_dict(keep_vars=True).items()}
    given = {canonical_name(key): value for key, value in weights.items()}
    if not given.keys() <= own.keys():
        parts = list(dict.fromkeys(key.partition(".")[0] for key in own))
        parts = [part for part in parts if all(f"{part}.{key}" in own for key in given)]
        if len(parts) > 1:
            parts = [part for part in parts if all(own[f"{part}.{key}"].shape == t.shape for key, t in given.items())]
        if len(parts) > 1:
            raise ValueError(
                f"{name} fits several parts of {type(model).__name__}: {', '.join(parts)}; pass a state dict with the"
                f" names of the whole model, such as {parts[0]}.{next(iter(given))}"
            )
        if parts:
            weights = {f"{parts[0]}.{key}": tensor for key, tensor in given.items()}
            given = weights
    return weights | _tied(own, given)


def _tied(own: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were saved under one of their names only, under their other names."""
    saved = {id(own[key]): tensor for key, tensor in given.items() if isinstance(own.get(key), nn.Parameter)}
    return {key: saved[id(value)] for key, value in own.items() if key not in given and id(value) in saved}
