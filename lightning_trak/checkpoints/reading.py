"""Finds the checkpoints that a user names: paths, URLs or state dicts in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from lightning_trak.checkpoints import directories  # noqa: F401  # makes its format known
from lightning_trak.checkpoints.base import Checkpoint, CheckpointFormat
from lightning_trak.checkpoints.formats import state_dict

CheckpointSource = str | os.PathLike[str] | Mapping[str, Tensor]
CheckpointsLike = Sequence[CheckpointSource] | CheckpointSource  # in this order a command line can tell them apart


def resolve_checkpoints(checkpoints: CheckpointsLike, weights_only: bool = True) -> list[Checkpoint]:
    """Find the checkpoints that a user names, without loading weights yet.

    Args:
        checkpoints: one of these, or a list of them in the order wanted (kinds may be mixed):

            - a directory that :class:`~lightning_trak.callbacks.snapshots.TRAKCallback` has written: all its snapshots;
            - a directory of a ModelCheckpoint, an output directory of the Trainer of Hugging Face, or a saved model:
              see :class:`~lightning_trak.checkpoints.directories.CheckpointDirectory`;
            - a ``.safetensors`` file;
            - a Lightning ``.ckpt`` or a ``.pt``, ``.pth`` or ``.bin`` file of ``torch.save``: its ``"state_dict"`` if
              it has one, else all of it;
            - a state dict in memory. It is copied, so that later training or loading does not change it.

            A path is local, or a URL that fsspec understands.
        weights_only: False lets ``torch.load`` run code from the files. Files that hold pickled objects, such as
            hyperparameters, need this. Use it only for files from a source you trust.

    Returns:
        At least one checkpoint.

    Raises:
        TypeError: if an item is none of these.
        ValueError: if there are no checkpoints, or two state dicts in memory are the same tensors of one model.
        FileNotFoundError: if a file does not exist, or a snapshot that a manifest names.
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
                    " own weights, not a copy; pass copy.deepcopy(model.state_dict()) instead"
                )
            copied = {key: tensor.cpu().clone() for key, tensor in tensors.items()}
            resolved.append(Checkpoint(name, partial(dict, copied)))
        elif isinstance(item, (str, os.PathLike)):
            location = os.fspath(item)
            kind = next(kind for kind in CheckpointFormat.formats if kind.recognizes(location))
            *earlier, last = kind.find(location, weights_only)
            resolved += [*(replace(checkpoint, final=False) for checkpoint in earlier), last]
        else:
            advice = "; pass its state_dict()" if isinstance(item, nn.Module) else ""
            raise TypeError(
                f"checkpoint {position} must be the path of a directory of checkpoints, a .safetensors, .ckpt, .pt,"
                f" .pth or .bin file, or a state dict, got {type(item).__name__}{advice}"
            )
    return resolved


def masks_of(checkpoints: Sequence[Checkpoint]) -> Tensor | None:
    """The training examples that the models of some checkpoints have seen.

    Args:
        checkpoints: the checkpoints.

    Returns:
        Bool ``(num_masks, num_train)``, a row for each checkpoint of a model that has seen a part of the training set,
        and for no other; None if there is no such checkpoint.

    Raises:
        ValueError: if they are parts of training sets of different sizes.
    """
    masks = [checkpoint.subset.mask for checkpoint in checkpoints if checkpoint.subset is not None]
    sizes = sorted({len(mask) for mask in masks})
    if len(sizes) > 1:
        raise ValueError(
            f"the checkpoints' models were trained on subsets of different training sets, of {sizes[0]} and"
            f" {sizes[1]} examples: take those of one fleet"
        )
    return torch.stack(masks) if masks else None
