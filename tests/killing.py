"""Processes that are killed in the middle of their work on files."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

context = multiprocessing.get_context("fork")


def run_forked(job: Callable[..., object], *arguments: Any, patience: float | None = None) -> int:
    """Run a job in a process of its own, and kill it after ``patience`` seconds; its exit code.

    Only a script may call this, before torch has started any thread.
    """
    process = context.Process(target=job, args=arguments)
    process.start()
    process.join(patience)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def die_in_file_operation(number: int | None) -> None:
    """Have this process killed by SIGKILL at its rename or flush of that number; None: never."""
    operations = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal operations
            operations += 1
            if operations == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
