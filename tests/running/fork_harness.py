"""Computes at once in many threads of a forked process.

A script of its own: children are forked before torch has started any thread.
"""

import multiprocessing
import threading

import torch

from lightning_trak.running.threads import compute_threads

THREADS = 8
NUMBERS = torch.arange(9)


def compute() -> None:
    together = threading.Barrier(THREADS)

    def count(_: int) -> int:
        together.wait()
        return len(NUMBERS.nonzero())

    with compute_threads(THREADS) as threads:
        assert list(threads.map(count, range(THREADS))) == [8] * THREADS


def main() -> None:
    NUMBERS.nonzero()  # only a thread that has computed leaves its pool to the child
    for _ in range(20):  # without the remedy, about three in four fail
        process = multiprocessing.get_context("fork").Process(target=compute)
        process.start()
        process.join()
        assert process.exitcode == 0


if __name__ == "__main__":
    main()
