"""Times as ratios. What is compared runs in turn, so another load on the machine slows all of it alike."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

Action = Callable[[], object]


@dataclass(frozen=True)
class Run:
    """The options of the command line for a part.

    Attributes:
        out: folder to write files to.
        repetitions: rounds of alternating measurements.
        device: where to measure.
        quick: whether to measure fewer examples, where a part can.
    """

    out: Path
    repetitions: int
    device: torch.device
    quick: bool = False


@dataclass
class Row:
    """A line of the table.

    Attributes:
        part: the part of the benchmark.
        name: what was measured.
        value: the number; a ratio of times unless ``unit`` says otherwise.
        unit: of the value, or what it is a ratio to.
        low: lowest of the repetitions, or lower end of a 95% interval.
        high: highest of the repetitions, or upper end of a 95% interval.
        repetitions: how many times it was measured; 0 where it was skipped.
        note: a remark for the reader.
    """

    part: str
    name: str
    value: float | None
    unit: str
    low: float | None = None
    high: float | None = None
    repetitions: int = 1
    note: str = ""


def seconds(action: Action) -> float:
    """Seconds that one call takes. With a GPU, until the GPU has finished."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - started


@contextmanager
def on_threads(number: int) -> Iterator[None]:
    """Let torch use this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ratios(baseline: Action, actions: Mapping[str, Action], repetitions: int = 5) -> dict[str, list[float]]:
    """Times of actions as multiples of the time of a baseline.

    In each round the baseline and all actions run once, after a first round that only warms up.

    Args:
        baseline: called at least twice in a round, before and after the actions.
        actions: functions to compare with the baseline, by name.
        repetitions: number of rounds.

    Returns:
        For each action one ratio a round: its time over the mean time of the baseline before and after.
    """
    measured: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(repetitions + 1):
        before = seconds(baseline)
        times = {name: seconds(action) for name, action in actions.items()}
        unit = (before + seconds(baseline)) / 2
        if round_:
            for name, time_ in times.items():
                measured[name].append(time_ / unit)
    return measured


def rows(
    part: str, measured: Mapping[str, list[float]], unit: str, notes: Mapping[str, str] | None = None
) -> list[Row]:
    """A row for each list of ratios: its median and range."""
    return [
        Row(part, name, statistics.median(found), unit, min(found), max(found), len(found), (notes or {}).get(name, ""))
        for name, found in measured.items()
    ]


def table(rows: list[Row]) -> str:
    """The rows in Markdown, aligned."""
    cells = [("what", "value", "range", "n", "unit")]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.3f}"
        spread = "" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}"
        unit = "; ".join(filter(None, (row.unit, row.note)))
        cells.append((f"{row.part}: {row.name}", value, spread, str(row.repetitions), unit))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "\n".join(f"| {line} |" for line in lines)
