"""Weights from any kind of checkpoint, as plain state dicts on CPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from lightning_trak.checkpoints.base import Checkpoint, CheckpointFormat
from lightning_trak.checkpoints.formats import state_dict

CheckpointSource = str | os.PathLike[str] | Mapping[str, Tensor]
CheckpointsLike = CheckpointSource | Sequence[CheckpointSource]


def resolve_checkpoints(checkpoints: CheckpointsLike, weights_only: bool = True) -> list[Checkpoint]:
    """Find the checkpoints that a user names, without loading weights yet.

    Args:
        checkpoints: one of these, or a list that may mix them, in the order wanted:

            - a directory that :class:`~lightning_trak.callbacks.snapshots.TRAKCallback` has written: all its snapshots;
            - a ``.safetensors`` file;
            - a Lightning ``.ckpt`` or a ``.pt``, ``.pth`` or ``.bin`` file of ``torch.save``: its ``"state_dict"`` when
              it has one, else all of it;
            - a state dict in memory, copied here so that later training or loading does not change it.

            Paths may be local or URLs that fsspec understands.
        weights_only: False lets ``torch.load`` run code from the files, which those need that hold pickled objects,
            such as hyperparameters. Only for files from a source you trust.

    Returns:
        At least one checkpoint.

    Raises:
        TypeError: if an item is none of these.
        ValueError: if there are no checkpoints, or two state dicts in memory are one model's live tensors.
        FileNotFoundError: if a file, or a snapshot that a manifest names, does not exist.
    """
    items = list(checkpoints) if isinstance(checkpoints, (list, tuple)) else [checkpoints]
    if not items:
        raise ValueError("no checkpoints: got an empty list; pass a snapshot directory or a list with at least one")
    resolved: list[Checkpoint] = []
    seen: dict[frozenset[tuple[str, int]], int] = {}
    for position, item in enumerate(items):
        if isinstance(item, Mapping):
            name = f"state dict {position}"
            tensors = state_dict(item, name)
            memory = frozenset((key, tensor.data_ptr()) for key, tensor in tensors.items())
            first = seen.setdefault(memory, position)
            if first != position:
                raise ValueError(
                    f"checkpoints {first} and {position} are the same tensors in memory: state_dict() returns a model's"
                    " live weights; keep copy.deepcopy(model.state_dict()) instead"
                )
            copied = {key: tensor.cpu().clone() for key, tensor in tensors.items()}
            resolved.append(Checkpoint(name, partial(dict, copied)))
        elif isinstance(item, (str, os.PathLike)):
            location = os.fspath(item)
            kind = next(kind for kind in CheckpointFormat.formats if kind.recognizes(location))
            resolved += kind.find(location, weights_only)
        else:
            raise TypeError(
                "expected a snapshot directory, a safetensors, .ckpt or .pt path, or a state dict as checkpoint"
                f" {position}, got {type(item).__name__}"
            )
    return resolved
