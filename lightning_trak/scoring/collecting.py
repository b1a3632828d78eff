"""Scores come in blocks of training examples. This keeps all of them, the best few, or sums."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_trak.running.ranks import Ranks
from lightning_trak.running.transfer import HostCopy
from lightning_trak.scoring.groups import Sums
from lightning_trak.scoring.topk import Best, Scores, best_of


def collect(
    blocks: Iterator[tuple[range, Tensor]],
    like: Tensor,
    count: int,
    top_k: int | None,
    largest: bool | None,
    ranks: Ranks,
    columns: Sums | None,
    left_out: Tensor | None = None,
) -> Scores:
    """All scores, the best few of each target, or sums over training examples.

    Args:
        blocks: training examples and their scores ``(num_targets, len(examples))``; each rank has its own.
        like: a tensor with a row for each target and the dtype of scores, on their device.
        count: the number of training examples.
        top_k: keep only this many training examples for each target; the rest is never held.
        largest: whether ``top_k`` keeps the highest scores or the lowest; None: both.
        ranks: the processes that share the blocks; all must call this.
        columns: how scores of training examples are added up; None: each has a column. With it, ``top_k`` keeps the
            best sums.
        left_out: columns that are never among the best, bool, one for each column.

    Returns:
        On every rank, on the CPU, scores of shape ``(num_targets, count)`` or ``(num_targets, columns.count)``, or the
        best of them.
    """
    if columns is not None:
        totals = torch.zeros(len(like), columns.count, dtype=torch.float64, device=like.device)
        for examples, block in blocks:
            columns.add_(totals, block, slice(examples.start, examples.stop), 1)
        scores = ranks.sum(totals.to("cpu", like.dtype))
        return scores if top_k is None else best_of(scores, top_k, largest, left_out)
    if top_k is None:
        return ranks.sum(_all(blocks, like, count))
    best = Best(top_k, largest, left_out)
    for examples, block in blocks:
        best.add(block, examples.start)
    return best.merged(ranks, like)


def _all(blocks: Iterator[tuple[range, Tensor]], like: Tensor, count: int) -> Tensor:
    """The scores of some blocks, and zeros elsewhere, on the CPU."""
    scores = torch.zeros(len(like), count, dtype=like.dtype)

    def keep(examples: range, copy: HostCopy) -> None:
        (scores[:, examples.start : examples.stop],) = copy.wait()

    coming: tuple[range, HostCopy] | None = None
    for examples, block in blocks:
        copy = HostCopy.start((block,))
        if coming is not None:
            keep(*coming)  # while the next one is on its way
        coming = examples, copy
    if coming is not None:
        keep(*coming)
    return scores
