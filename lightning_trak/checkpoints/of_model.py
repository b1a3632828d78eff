"""The checkpoints of a given model, with weights under the model's own names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor, nn

from lightning_trak.checkpoints.adapters import adapter_under_own_names
from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.checkpoints.formats import state_dict
from lightning_trak.checkpoints.manifest import Snapshot, TensorFile
from lightning_trak.checkpoints.names import canonical_name
from lightning_trak.checkpoints.reading import CheckpointsLike, resolve_checkpoints
from lightning_trak.checkpoints.weights import is_extra_state
from lightning_trak.texts.messages import listed

CURRENT = "the model's current weights"

_told = WarningCache()  # gives each warning once


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
        At least one checkpoint. Weights that were saved of a part of the model get the part's name in front: those of
        ``self.model`` begin with ``model.``. Weights of a module around the model lose the model's name there, such as
        the ``module.`` of DistributedDataParallel.
    """
    if checkpoints is None:
        return [Checkpoint(CURRENT, partial(_current, model), live=True)]
    return [_for_model(checkpoint, model) for checkpoint in resolve_checkpoints(checkpoints, weights_only)]


def _for_model(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    if checkpoint.record is not None:
        return _of_trained(checkpoint, checkpoint.record, model)
    if checkpoint.adapter is not None:
        return replace(checkpoint, load=partial(adapter_under_own_names, checkpoint, model))
    return replace(checkpoint, load=partial(_under_own_names, checkpoint.name, checkpoint.load, model))


def _of_trained(checkpoint: Checkpoint, record: Snapshot, model: nn.Module) -> Checkpoint:
    """A snapshot of TRAKCallback, which has all names of the module that was trained: the model, or one around it.

    Raises:
        ValueError: if the module around the model has left out frozen parameters, or has several such models.
    """
    own = {canonical_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained = {name for group in record.parameter_groups for name in group.parameters}
    if not own or not own.isdisjoint(trained):
        return checkpoint
    end = "." + min(own)
    parts = [name.removesuffix(end) for name in sorted(trained) if name.endswith(end)]
    parts = [part for part in parts if all(f"{part}.{name}" in trained for name in own)]
    if not parts:
        return checkpoint
    kind = type(model).__name__
    if len(parts) > 1 or record.frozen is not None:
        problem = (
            f"has several models that fit {kind}: {', '.join(parts)}"
            if len(parts) > 1
            else f"leaves out frozen parameters of the module whose {parts[0]} is this {kind}"
        )
        raise ValueError(
            f"{checkpoint.name} {problem}; pass the module that was trained as the model, with output= if it declares"
            " none"
        )
    prefix = f"{parts[0]}."
    groups = tuple(
        replace(group, parameters=tuple(name.removeprefix(prefix) for name in group.parameters))
        for group in record.parameter_groups
    )
    return replace(
        checkpoint,
        load=partial(_inside, prefix, checkpoint.name, kind, checkpoint.load),
        record=replace(record, parameter_groups=groups),
        read_file=None
        if checkpoint.read_file is None
        else partial(_inside, prefix, checkpoint.name, kind, checkpoint.read_file),
    )


def _inside(
    prefix: str, name: str, kind: str, read: Callable[..., dict[str, Tensor]], *file: TensorFile
) -> dict[str, Tensor]:
    """The tensors of a part of the module that was saved, without the part's name in front."""
    tensors = {canonical_name(key): tensor for key, tensor in read(*file).items()}
    _tell_unused(prefix.removesuffix("."), name, kind, [key for key in tensors if not key.startswith(prefix)])
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _tell_unused(part: str, name: str, kind: str, unused: list[str]) -> None:
    if unused:
        _told.warn(
            f"the weights of {part} in {name} are those of this {kind}; the others are not used:"
            f" {listed(unused, most=8)}"
        )


def _current(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's weights, which later training does not change."""
    return {name: tensor.cpu().clone() for name, tensor in state_dict(model.state_dict(), CURRENT).items()}


def _under_own_names(name: str, read: Callable[[], dict[str, Tensor]], model: nn.Module) -> dict[str, Tensor]:
    """Read weights, and give them the names that they have in the model.

    Raises:
        ValueError: if they may be those of several parts of the model, or hold several models that fit.
    """
    weights = read()
    own: dict[str, Any] = {canonical_name(key): value for key, value in model.state_dict(keep_vars=True).items()}
    given = {canonical_name(key): value for key, value in weights.items()}
    if not given.keys() <= own.keys():
        placed = _in_part(own, given, name, model) or _of_whole(own, given, name, model)
        weights, given = (placed, placed) if placed else (weights, given)
    return weights | _tied(own, given)


def _in_part(own: dict[str, Any], given: dict[str, Tensor], name: str, model: nn.Module) -> dict[str, Tensor] | None:
    """Weights of a part of the model, with the part's name in front; None if they are not."""
    parts = list(dict.fromkeys(key.partition(".")[0] for key in own))
    parts = [part for part in parts if all(f"{part}.{key}" in own for key in given)]
    if len(parts) > 1:
        parts = [part for part in parts if all(own[f"{part}.{key}"].shape == t.shape for key, t in given.items())]
    if len(parts) > 1:
        raise ValueError(
            f"{name} fits several parts of {type(model).__name__}: {', '.join(parts)}; pass a state dict with the"
            f" names of the whole model, such as {parts[0]}.{next(iter(given))}"
        )
    return {f"{parts[0]}.{key}": tensor for key, tensor in given.items()} if parts else None


def _of_whole(own: dict[str, Any], given: dict[str, Tensor], name: str, model: nn.Module) -> dict[str, Tensor] | None:
    """Weights of a module that has the model as a part, without the part's name in front; None if they are not.

    DistributedDataParallel, an average of weights and the LightningModule around a network are such modules.
    """
    if not own.keys().isdisjoint(given):  # these are the model's own weights, and something is wrong with them
        return None
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in given.items():
        part, _, rest = key.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    fitting = [part for part, weights in parts.items() if _is_model(own, weights)]
    if len(fitting) > 1:
        raise ValueError(
            f"{name} holds several models that fit {type(model).__name__}: {', '.join(fitting)}; pass a state dict of"
            f" the one that you mean, without its name in front: {next(iter(parts[fitting[0]]))} in place of"
            f" {fitting[0]}.{next(iter(parts[fitting[0]]))}"
        )
    if fitting:
        unused = [key for key in given if key.partition(".")[0] != fitting[0]]
        _tell_unused(fitting[0], name, type(model).__name__, unused)
        return parts[fitting[0]]
    return _in_part(own, next(iter(parts.values())), name, model) if len(parts) == 1 else None


def _is_model(own: dict[str, Any], given: dict[str, Tensor]) -> bool:
    """Whether weights have all names and shapes of the model, and no others. Tied ones may have one of their names."""
    complete = given | _tied(own, given)
    needed = {key for key in own if not is_extra_state(key)}
    return complete.keys() == needed and all(own[key].shape == tensor.shape for key, tensor in complete.items())


def _tied(own: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were saved under one of their names only, under their other names."""
    saved = {id(own[key]): tensor for key, tensor in given.items() if isinstance(own.get(key), nn.Parameter)}
    return {key: saved[id(value)] for key, value in own.items() if key not in given and id(value) in saved}
