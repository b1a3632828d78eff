"""Subsets of the training set without the strongest proponents."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_trak.checks import positive, require_tensor


def removal_masks(scores: Tensor, k: int) -> Tensor:
    """For each target, the training set without its ``k`` strongest proponents.

    Args:
        scores: ``(num_targets, num_train)``. Of equal scores, those of the first examples count as higher.
        k: how many are removed, at least one and not all.

    Returns:
        Bool ``(num_targets, num_train)``, false at the ``k`` highest scores of each row.

    Raises:
        ValueError: if the scores are not a matrix of numbers, or k is out of range.
    """
    _check(scores, k)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, ranked(scores, k), False)


def joint_removal_mask(scores: Tensor, k: int) -> Tensor:
    """The training set without the ``k`` strongest proponents of several targets together.

    Targets take turns: the strongest proponent of each is removed, then the second of each, and so on, until ``k`` are
    removed. One set for all targets takes one training where :func:`removal_masks` takes one for each; and no target's
    scores count for more because they are larger.

    Args:
        scores: ``(num_targets, num_train)``. Of equal scores, those of the first examples count as higher.
        k: how many are removed in all, at least one and not all.

    Returns:
        Bool ``(num_train,)``, false at the examples that are removed.

    Raises:
        ValueError: if the scores are not a matrix of numbers, or k is out of range.
    """
    _check(scores, k)
    turns = ranked(scores, scores.shape[1]).T.flatten().tolist()
    kept = torch.ones(scores.shape[1], dtype=torch.bool)
    kept[list(dict.fromkeys(turns))[:k]] = False
    return kept


def ranked(scores: Tensor, k: int) -> Tensor:
    """Positions of the ``k`` highest scores of each row, highest first; of equal ones the first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :k]


def require_scores(scores: Mapping[str, Tensor], num_targets: int, num_train: int) -> None:
    """Check that each method's scores are about these data."""
    if not isinstance(scores, Mapping):
        raise TypeError(
            f'scores must be a dict of the scores of each method, such as {{"TRAK": scores}}; got a'
            f" {type(scores).__name__}"
        )
    for name, values in scores.items():
        require_tensor(f"scores of {name}", values)
        if values.shape != (num_targets, num_train):
            raise ValueError(
                f'scores of "{name}" must have shape (num_targets, num_train) = {(num_targets, num_train)}, got'
                f" {tuple(values.shape)}"
            )
        if not values.isfinite().all():
            raise ValueError(
                f'scores of "{name}" are not finite in {int((~values.isfinite()).sum())} places; score again'
            )


def _check(scores: Tensor, k: int) -> None:
    require_tensor("scores", scores)
    if scores.ndim != 2 or scores.isnan().any():
        raise ValueError(
            f"scores must be numbers of shape (num_targets, num_train), got shape {tuple(scores.shape)} with"
            f" {int(scores.isnan().sum())} NaNs"
        )
    if not positive("k", k) < scores.shape[1]:
        raise ValueError(f"k must be less than the {scores.shape[1]} training examples, got {k}")
