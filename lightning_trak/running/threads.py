"""Threads that compute beside the main one."""

from concurrent.futures import ThreadPoolExecutor

import torch


def compute_threads(number: int | None = None) -> ThreadPoolExecutor:
    """Threads for PyTorch's operations, in a forked process, too.

    In a forked process, the first new thread that computes makes PyTorch's own pool of threads anew. If two do so at
    once, one finds no pool, and PyTorch fails ("Invalid thread pool!"). So the pool is made here.

    Args:
        number: of threads; None: Python's choice.
    """
    torch.set_num_threads(torch.get_num_threads())
    return ThreadPoolExecutor(number)
