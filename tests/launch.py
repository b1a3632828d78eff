"""Runs modules and scripts in other processes.

To import Lightning takes a process longer than most of what it does here. So most processes are forked from one that
has imported it, and has done nothing else.
"""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
PATIENCE = 240.0  # seconds


def run_module(name: str, *arguments: str) -> str:
    """Run a module of the tests in a process; its output, or a failure that shows it."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        _require_success([_start(name, arguments, log, {})], log)
        return log.read_text()


def start_script(script: Path, *arguments: str | Path) -> BaseProcess:
    """Start a script. Its output is in a file beside it."""
    return _start(script, arguments, script.with_suffix(".log"), {})


def run_script(script: Path, *arguments: str | Path) -> int:
    """Run a script that may kill its own process; the exit code. Its output is in a file beside it."""
    process = start_script(script, *arguments)
    _end([process])
    assert process.exitcode is not None
    return process.exitcode


def run_together(script: str | Path, root: Path) -> None:
    """Run a script, or a module of the tests, as two ranks. Its argument is a folder, which gets the output.

    A script that trains with FSDP2 must end with :func:`leave_together`.
    """
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    ranks = [_start(script, [root], root / "log", settings | {"LOCAL_RANK": str(rank)}) for rank in range(2)]
    _require_success(ranks, root / "log")


def run_by_lightning(module: str, root: Path) -> None:
    """Run a module of the tests in a new Python, which Lightning's own launcher starts a second time.

    The module must end with ``torch.distributed.destroy_process_group()``, or with :func:`leave_together` if it trains
    with FSDP2. Otherwise a thread of gloo may free a tensor after Python has ended, and PyTorch aborts ("terminate
    called without an active exception").
    """
    log = root / "log"
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_PORT": _free_port(), "PYTHONFAULTHANDLER": "1"}
    with log.open("w") as output:  # not a pipe, which a process that is left over would keep open
        process = subprocess.Popen(
            [sys.executable, "-m", module, root],
            cwd=ROOT,
            env=os.environ | settings,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGABRT)
            process.wait(10)
            pytest.fail(f"not done after {PATIENCE:g} seconds:\n{log.read_text()}")
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, log.read_text()


def server() -> BaseContext:
    """Starts processes. They are forked from one that has imported Lightning, and has done nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONHASHSEED", "7")  # sets have another order there than in the tests' own process
        forkserver.ensure_running()
    return context


def leave_together() -> NoReturn:
    """End a rank's process, once all ranks are here, without Python's shutdown.

    After training with FSDP2 on the CPU, torch aborts now and then while the interpreter shuts down.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def _start(script: str | Path, arguments: Sequence[str | Path], log: Path, settings: dict[str, str]) -> BaseProcess:
    process = server().Process(target=_run, args=(script, [*map(str, arguments)], log, {**os.environ, **settings}))
    process.start()
    return process


def _run(script: str | Path, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run a script in this process, as Python would."""
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    faulthandler.enable()  # shows where each thread is, if the process is told to abort
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # workers of loaders start as they do for users
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    if isinstance(script, Path):
        runpy.run_path(str(script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def _end(processes: list[BaseProcess]) -> None:
    """Wait until all processes have ended. One that hangs is aborted, and prints where each of its threads is."""
    for process in processes:
        process.join(PATIENCE)
    for process in processes:
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGABRT)
            process.join()


def _require_success(processes: list[BaseProcess], log: Path) -> None:
    """Wait until all processes have ended. Failures show what they printed."""
    _end(processes)
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes {codes} within {PATIENCE:g} seconds:\n{log.read_text()}"
