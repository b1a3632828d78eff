"""A process that is killed in the middle of its work on files."""

import os
import signal
from typing import Any


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
