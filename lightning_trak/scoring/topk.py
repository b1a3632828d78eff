"""The best few scores of each target, kept while blocks of scores stream by."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_trak.running.ranks import Ranks
from lightning_trak.texts.display import best_line, best_table

_FEW = 8  # if scores are more than this many times those that are kept, these are chosen before they are sorted


class TopK(NamedTuple):
    """The training examples with the highest (or lowest) scores.

    Attributes:
        values: scores, best first, shape ``(num_targets, k)``.
        indices: positions in the training set, int64, shape ``(num_targets, k)``.
    """

    values: Tensor
    indices: Tensor

    def __repr__(self) -> str:
        return best_line(self, {"": self})

    def _repr_html_(self) -> str:
        return best_table(self, {"": self})


class BothEnds(NamedTuple):
    """The training examples with the highest and with the lowest scores of each target.

    ``values`` and ``indices`` are those of the proponents, so that they can be read as a :class:`TopK`.

    Attributes:
        proponents: those with the highest scores, highest first.
        opponents: those with the lowest scores, lowest first.
    """

    proponents: TopK
    opponents: TopK

    @property
    def values(self) -> Tensor:
        """The scores of the proponents, shape ``(num_targets, k)``."""
        return self.proponents.values

    @property
    def indices(self) -> Tensor:
        """The positions of the proponents in the training set, int64, shape ``(num_targets, k)``."""
        return self.proponents.indices

    def __repr__(self) -> str:
        return best_line(self, self._asdict())

    def _repr_html_(self) -> str:
        return best_table(self, self._asdict())


Scores = Tensor | TopK | BothEnds


def merge_top_k(parts: list[TopK], k: int, largest: bool) -> TopK:
    """The best ``k`` of several candidate lists of the same targets. Of equal scores, the first positions are best.

    Args:
        parts: candidates, each ``(num_targets, any number)``.
        k: how many to keep; fewer are returned when there are fewer.
        largest: whether high scores are best.
    """
    indices, order = torch.cat([part.indices for part in parts], dim=1).sort(dim=1)
    values = torch.cat([part.values for part in parts], dim=1).gather(1, order)
    return _sorted(values, indices, k, largest)


def block_top_k(scores: Tensor, start: int, k: int, largest: bool) -> TopK:
    """The best ``k`` of a block of scores ``(num_targets, n)`` whose first column is training example ``start``.

    Of equal scores, the first are best, so that no result depends on how scores are cut into blocks.
    """
    if 0 < _FEW * k < scores.shape[1]:
        columns = _best_columns(scores, k, largest)
        scores = scores.gather(1, columns)
    else:
        columns = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    return _sorted(scores, columns + start, k, largest)


def _sorted(values: Tensor, indices: Tensor, k: int, largest: bool) -> TopK:
    """The best ``k`` of scores that stand in the order of their positions."""
    best = values.sort(dim=1, descending=largest, stable=True)
    return TopK(best.values[:, :k], indices.gather(1, best.indices[:, :k]))


def _best_columns(scores: Tensor, k: int, largest: bool) -> Tensor:
    """The columns of the best ``k`` scores, ascending; a stable sort of all scores takes ten times as long.

    ``topk`` takes any of several equal scores. Only the last place is open: where its score stands, the first columns
    with this score are taken.
    """
    best = scores.topk(k, dim=1, largest=largest)
    last = best.values[:, -1:]
    places = torch.arange(scores.shape[1], 0, -1, dtype=torch.int32, device=scores.device)
    first = torch.where(scores == last, places, 0).topk(k, dim=1).indices
    number = torch.arange(k, device=scores.device) - (best.values != last).sum(dim=1, keepdim=True)
    return torch.where(number < 0, best.indices, first.gather(1, number.clamp(min=0))).sort(dim=1).values


class Best:
    """Keeps the best of blocks of scores that stream by: at one end, or at both.

    Args:
        k: how many at each end; fewer if there are fewer.
        largest: which end; None: both.
        left_out: training examples that are never among the best, bool, shape ``(num_train,)``; None: none.
    """

    def __init__(self, k: int, largest: bool | None, left_out: Tensor | None = None) -> None:
        self.k = k if left_out is None else min(k, int((~left_out).sum()))
        self._left_out = left_out
        self._both = largest is None
        self._ends: list[tuple[bool, TopK | None]] = [
            (end, None) for end in ((True, False) if largest is None else (largest,))
        ]

    def add(self, scores: Tensor, start: int) -> None:
        """Take a block of scores.

        Args:
            scores: ``(num_targets, n)``, whose first column is training example ``start``.
            start: its position.
        """
        for number, (largest, best) in enumerate(self._ends):
            if self._left_out is not None:
                out = self._left_out[start : start + scores.shape[1]].to(scores.device)
                scores = scores.masked_fill(out, -torch.inf if largest else torch.inf)
            if best is None or best.values.shape[1] < self.k or not scores.is_cpu:  # another device must not wait
                block = block_top_k(scores, start, self.k, largest)
                self._ends[number] = largest, block if best is None else merge_top_k([best, block], self.k, largest)
                continue
            # Later blocks seldom have a score that is kept, and to look for the first takes a twentieth of the time.
            last = best.values[:, -1]
            kept = scores.amax(1) <= last if largest else scores.amin(1) >= last
            rows = (~kept).nonzero().flatten()  # those with NaN, too
            block = block_top_k(scores[rows], start, self.k, largest)
            merged = merge_top_k([TopK(best.values[rows], best.indices[rows]), block], self.k, largest)
            best.values[rows], best.indices[rows] = merged

    def merged(self, ranks: Ranks, like: Tensor) -> TopK | BothEnds:
        """The best of all ranks, on the CPU. All must call this.

        Args:
            ranks: the processes that share the blocks.
            like: a tensor with a row for each target and the dtype of scores, for a rank that took no block.
        """
        none = TopK(like.new_empty(len(like), 0).cpu(), torch.empty(len(like), 0, dtype=torch.int64))
        found = []
        for largest, best in self._ends:
            mine = none if best is None else TopK(best.values.cpu(), best.indices.cpu())
            found.append(merge_top_k(ranks.gather(mine), self.k, largest))
        return BothEnds(*found) if self._both else found[0]


def best_of(scores: Tensor, k: int, largest: bool | None, left_out: Tensor | None = None) -> TopK | BothEnds:
    """The best of a whole matrix of scores: at one end, or with ``largest=None`` at both.

    Args:
        scores: ``(num_targets, n)``.
        k: how many at each end; fewer are returned when there are fewer.
        largest: which end; None: both.
        left_out: columns that are never among the best, bool, shape ``(n,)``.
    """
    best = Best(k, largest, left_out)
    best.add(scores, 0)
    return best.merged(Ranks(), scores)


def join(parts: Sequence[Scores]) -> Scores:
    """The scores of several sets of targets, one after another. All parts are of one type."""
    if isinstance(parts[0], Tensor):
        return torch.cat(cast(list[Tensor], parts))
    if isinstance(parts[0], BothEnds):
        return BothEnds(*(_joined(ends) for ends in zip(*cast(Sequence[BothEnds], parts), strict=True)))
    return _joined(cast(Sequence[TopK], parts))


def _joined(parts: Sequence[TopK]) -> TopK:
    return TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))


def rows_of(scores: Scores, rows: slice | list[int]) -> Scores:
    """The scores of some targets."""
    if isinstance(scores, Tensor):
        return scores[rows]
    return each_end(scores, lambda end: TopK(end.values[rows], end.indices[rows]))


def each_end(best: TopK | BothEnds, change: Callable[[TopK], TopK]) -> TopK | BothEnds:
    """Change the scores of one end, or those of both ends in the same way."""
    return BothEnds(*map(change, best)) if isinstance(best, BothEnds) else change(best)


def all_indices(best: TopK | BothEnds) -> Tensor:
    """The training examples of all ends side by side, shape ``(num_targets, k)`` or ``(num_targets, 2 k)``."""
    ends = best if isinstance(best, BothEnds) else (best,)
    return torch.cat([end.indices for end in ends], dim=1)


def strongest(scores: Scores, k: int, largest: bool = True) -> dict[str, TopK]:
    """The strongest ``"proponents"`` and ``"opponents"`` of each target; of a :class:`TopK`, the kind that it holds.

    Args:
        scores: ``(num_targets, num_train)``, or the best of each target.
        k: how many of each; fewer are returned when there are fewer.
        largest: of a :class:`TopK`, whether it holds the highest scores.
    """
    if isinstance(scores, Tensor):
        return {"proponents": block_top_k(scores, 0, k, True), "opponents": block_top_k(scores, 0, k, False)}
    one_end = {"proponents" if largest else "opponents": scores}
    ends = scores._asdict() if isinstance(scores, BothEnds) else one_end
    return {name: TopK(end.values[:, :k], end.indices[:, :k]) for name, end in ends.items()}
