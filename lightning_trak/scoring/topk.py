"""The best few scores of each target, kept while blocks of scores stream by."""

from typing import NamedTuple

import torch
from torch import Tensor


class TopK(NamedTuple):
    """The training examples with the highest (or lowest) scores.

    Attributes:
        values: scores, best first, shape ``(num_targets, k)``.
        indices: positions in the training set, int64, shape ``(num_targets, k)``.
    """

    values: Tensor
    indices: Tensor


def merge_top_k(parts: list[TopK], k: int, largest: bool) -> TopK:
    """The best ``k`` of several candidate lists of the same targets.

    Args:
        parts: candidates, each ``(num_targets, any number)``.
        k: how many to keep; fewer are returned when there are fewer.
        largest: whether high scores are best.
    """
    values = torch.cat([part.values for part in parts], dim=1)
    indices = torch.cat([part.indices for part in parts], dim=1)
    best = values.topk(min(k, values.shape[1]), dim=1, largest=largest)
    return TopK(best.values, indices.gather(1, best.indices))


def block_top_k(scores: Tensor, start: int, k: int, largest: bool) -> TopK:
    """The best ``k`` of a block of scores ``(num_targets, n)`` whose first column is training example ``start``."""
    best = scores.topk(min(k, scores.shape[1]), dim=1, largest=largest)
    return TopK(best.values, best.indices + start)


def strongest(scores: Tensor | TopK, k: int, largest: bool = True) -> dict[str, TopK]:
    """The strongest ``"proponents"`` and ``"opponents"`` of each target; of a :class:`TopK`, the kind that it holds.

    Args:
        scores: ``(num_targets, num_train)``, or the best of each target.
        k: how many of each; fewer are returned when there are fewer.
        largest: of a :class:`TopK`, whether it holds the highest scores.
    """
    if isinstance(scores, Tensor):
        return {"proponents": block_top_k(scores, 0, k, True), "opponents": block_top_k(scores, 0, k, False)}
    return {"proponents" if largest else "opponents": TopK(scores.values[:, :k], scores.indices[:, :k])}
