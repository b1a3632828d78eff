"""The schedule visits each step once, from the last to the first, with few states in memory."""

import pytest

from lightning_trak.replay.recording.spacing import keeps_state
from lightning_trak.replay.reverse.schedule import backwards


def play(first, stop, states, held):
    """Follow a schedule. Returns the steps visited, the steps done again, and the most states held at once."""
    current, kept, remembered = None, {}, {}
    visited, advanced, most = [], 0, 0
    for kind, step, remember in backwards(first, stop, states, held):
        if kind == "load":
            assert step in states
            current = step
        elif kind == "keep":
            assert current == step
            kept[step] = True
        elif kind == "recall":
            del kept[step]
            current = step
        elif kind == "advance":
            assert current == step
            if remember:
                remembered[step] = True
            current, advanced = step + 1, advanced + 1
        else:
            del remembered[step]
            visited.append(step)
        most = max(most, len(kept) + len(remembered))
    assert not kept
    assert not remembered
    return visited, advanced, most


@pytest.mark.parametrize("spacing", ["sqrt", "log", 1, 3, 7, 50])
@pytest.mark.parametrize("held", [2, 3, 100])
@pytest.mark.parametrize("total", [1, 2, 17, 64])
@pytest.mark.parametrize("last", [1, 5, None])
def test_each_step_is_visited_once_from_the_last(spacing, held, total, last):
    states = sorted({step for step in range(total) if keeps_state(step, spacing)} | {total})
    first = 0 if last is None else max(0, total - last)
    visited, _, _ = play(first, total, states, held)
    assert visited == list(range(total - 1, first - 1, -1))


def test_memory_and_time_of_long_runs():
    total = 10_000
    squares = [step for step in range(total + 1) if keeps_state(step, "sqrt")]
    assert len(squares) == 101
    _, advanced, most = play(0, total, squares, 200)
    assert (advanced, most <= 200) == (total, True)
    powers = [step for step in range(total) if keeps_state(step, "log")] + [total]
    assert len(powers) == 16
    _, advanced, most = play(0, total, powers, 80)
    assert most <= 2 * 80
    assert advanced < 2 * total


def test_only_the_last_steps_are_done_again():
    visited, advanced, _ = play(95, 100, [0, 1, 4, 9, 16, 25, 36, 49, 64, 81, 100], 200)
    assert visited == [99, 98, 97, 96, 95]
    assert advanced == 19
