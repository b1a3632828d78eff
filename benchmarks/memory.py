"""Peak memory, read from the operating system (Linux)."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TypeVar

from benchmarks.models import WORKLOADS
from benchmarks.ours import featurizer, settings

MIB = 1 << 20
CONTEXT: BaseContext = multiprocessing.get_context("spawn")
Found = TypeVar("Found")


def status(field: str) -> int:
    """A field of this process's status, in bytes: ``VmRSS``, ``VmHWM``, ``RssAnon`` or ``RssFile``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory can be measured on Linux only")


def reset_peak() -> None:
    """Reset ``VmHWM`` to the present memory."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(action: Callable[[], object]) -> int:
    """Peak memory of an action, in bytes above the resident memory before it."""
    before = status("VmRSS")
    reset_peak()
    action()
    return status("VmHWM") - before


def in_new_process(measure: Callable[..., Found], *arguments: object) -> Found:
    """What a function returns that measures in a new process.

    ``getrusage`` cannot be used: a process inherits the peak of the process that started it.
    """
    with ProcessPoolExecutor(1, CONTEXT) as fresh:
        return fresh.submit(measure, *arguments).result()


def fresh_peak(workload: str, size: int, setting: str) -> int:
    """Peak memory in bytes of one setting, or of a ``"training step"``, in a new process."""
    return in_new_process(_peak, workload, size, setting)


def _peak(workload: str, size: int, setting: str) -> int:
    work = WORKLOADS[workload](size)
    return peak_of(work.train_step if setting == "training step" else featurizer(work, settings()[setting]))


@contextmanager
def sampled(interval: float = 0.002) -> Iterator[dict[str, int]]:
    """Peaks of ``RssAnon`` and ``RssFile`` while the block runs, in bytes, sampled by a thread."""
    peaks = {"RssAnon": 0, "RssFile": 0}
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for field in peaks:
                peaks[field] = max(peaks[field], status(field))
            time.sleep(interval)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()
