"""In which order the states of a run are computed again, so that they can be visited from the last to the first.

Full states are on disk at some steps. The steps between two of them are a segment. All states of a segment are kept in
memory if they fit. If not, the segment is cut into as many pieces as states fit, and each piece is treated in the same
way: a tree of states, of which one path from the root to a leaf is in memory at a time (Griewank 1992, Achieving
logarithmic growth of temporal and spatial complexity in reverse automatic differentiation).
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Kind = Literal["load", "keep", "recall", "advance", "reverse"]


class Action(NamedTuple):
    """One action of the schedule.

    Attributes:
        kind: ``"load"``: read the full state before the step from disk. ``"keep"``: keep the current state, that before
            the step, in memory. ``"recall"``: return to the kept state before the step, and forget it. ``"advance"``:
            do the step again. ``"reverse"``: differentiate the step, whose states before and after are known.
        step: the step.
        remember: of ``"advance"``: whether ``"reverse"`` will follow before another ``"load"`` or ``"recall"``, so that
            its batches must be kept.
    """

    kind: Kind
    step: int
    remember: bool = False


def backwards(first: int, stop: int, states: Sequence[int], held: int) -> Iterator[Action]:
    """Visit the steps ``stop - 1`` to ``first``.

    Args:
        first: the last step to visit.
        stop: the first step to visit, plus one.
        states: the steps before which there are full states, in order.
        held: the number of states that are kept in memory for a segment, or for a piece of one; at least 2.
    """
    starts = [step for step in states if step < stop]
    for start in reversed(starts):
        yield Action("load", start)
        yield from _segment(start, min([stop, *(step for step in states if step > start)]), first, held)
        if start <= first:
            return


def _segment(start: int, stop: int, first: int, held: int) -> Iterator[Action]:
    """Visit the steps of a segment from the last, as far as ``first``. The current state is that before ``start``."""
    if stop - start <= held:
        for step in range(start, stop):
            yield Action("advance", step, remember=step >= first)
        for step in range(stop - 1, max(start, first) - 1, -1):
            yield Action("reverse", step)
        return
    size = -(-(stop - start) // held)
    pieces = [piece for piece in range(start, stop, size) if piece + size > first]
    for step in range(start, pieces[-1]):
        if step in pieces:
            yield Action("keep", step)
        yield Action("advance", step)
    for piece in reversed(pieces):
        if piece != pieces[-1]:
            yield Action("recall", piece)
        yield from _segment(piece, min(piece + size, stop), first, held)
