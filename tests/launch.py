"""Runs modules and scripts in other processes."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent


def run_module(name: str, *arguments: str) -> str:
    """Run a module of the tests in a process; its output, or a failure that shows it."""
    result = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def run_together(arguments: list[str | Path], log: Path, timeout: float = 240) -> None:
    """Run Python with these arguments, of which Lightning starts a copy for each further process.

    Failures and hangs show what all processes printed. A process that hangs prints where each of its threads is.

    A script must end with ``torch.distributed.destroy_process_group()``, or with :func:`leave_together` if it trains
    with FSDP2. Otherwise a thread of gloo may free a tensor after Python has ended, and PyTorch aborts ("terminate
    called without an active exception").
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_PORT": port, "PYTHONFAULTHANDLER": "1"}
    with log.open("w") as output:  # not a pipe, which a process that is left over would keep open
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            process.wait(10)
            pytest.fail(f"not done after {timeout} seconds:\n{log.read_text()}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, log.read_text()


def leave_together() -> NoReturn:
    """End a rank's process, once all ranks are here, without Python's shutdown.

    After training with FSDP2 on the CPU, torch aborts now and then while the interpreter shuts down.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
