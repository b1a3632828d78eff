"""Ground truth that a user names: the directory of a fleet, or one file with masks and outputs."""

from pathlib import Path

import torch

from lightning_trak.retraining.fleets.results import Retrained, read_fleet
from lightning_trak.storage.files import DamagedFileError, all_tensors, open_safetensors
from lightning_trak.storage.user_files import existing_path, unreadable


def load_ground_truth(path: str | Path) -> Retrained:
    """Read subsets of the training set, and the outputs of models that were trained on them.

    Args:
        path: directory of a :class:`~lightning_trak.retraining.RetrainingFleet` that has run; or a safetensors file
            with ``masks``, bool ``(num_subsets, num_train)``, and ``outputs``, floats ``(num_targets, num_subsets)`` or
            ``(num_targets, num_subsets, num_seeds)``.

    Raises:
        FileNotFoundError: if there is no such file.
        RuntimeError: if members of the fleet are missing.
        ValueError: if it is another kind of file, its tensors do not fit together, or outputs are not finite.
        OSError: if it cannot be read.
    """
    path = existing_path(path, "it should hold masks and outputs of retrained models")
    if path.is_dir():
        return read_fleet(path)
    expected = (
        "expected a safetensors file with masks, bool (num_subsets, num_train), and outputs, numbers (num_targets,"
        " num_subsets[, num_seeds])"
    )
    try:
        with open_safetensors(path) as file:
            tensors = all_tensors(file)
    except DamagedFileError as error:
        raise unreadable(error, expected) from error
    if missing := {"masks", "outputs"} - set(tensors):
        raise ValueError(f'"{path}" lacks {" and ".join(sorted(missing))}: {expected}')
    masks, outputs = tensors["masks"], tensors["outputs"]
    if (
        masks.dtype != torch.bool
        or masks.ndim != 2
        or not outputs.is_floating_point()
        or outputs.ndim not in (2, 3)
        or outputs.shape[1] != len(masks)
    ):
        raise ValueError(
            f'"{path}" holds masks, {masks.dtype} {tuple(masks.shape)}, and outputs, {outputs.dtype}'
            f" {tuple(outputs.shape)}: {expected}"
        )
    if not outputs.isfinite().all():
        raise ValueError(f'"{path}" holds outputs that are NaN or infinite; leave these targets or subsets out')
    return Retrained(masks, outputs)
