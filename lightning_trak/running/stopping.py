"""SIGTERM and Ctrl-C: the run ends where nothing is lost, with a message."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning as L
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_trak.compatibility import after_signal_handlers
from lightning_trak.running.ranges import Stop
from lightning_trak.running.ranks import Ranks


class Terminated(SystemExit):
    """SIGTERM has ended the work. If nobody catches it, the process exits with 143, as shells say of that signal."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 128 + signal.SIGTERM


class Interruption:
    """Takes SIGTERM and Ctrl-C over from Lightning, which in a predict loop ignores the one and exits on the other.

    A signal that the process ignores stays ignored, and a handler of the user's is called first.

    Args:
        stop: is requested by either signal; a second Ctrl-C ends at once. None: both end at once.

    Attributes:
        received: the last signal.
    """

    def __init__(self, stop: Stop | None = None) -> None:
        self.received: signal.Signals | None = None
        self._stop = stop
        self._trainer: L.Trainer | None = None
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def watching(self, trainer: L.Trainer) -> Iterator[None]:
        """For the length of a run of a Trainer, whose signal connector is another one afterwards; handlers are not.

        Raises:
            KeyboardInterrupt: where Lightning exits because of one.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._trainer, self._before = trainer, before
        # Lightning's own for SIGTERM has all ranks meet wherever they are, and would mix that up with what they send.
        after_signal_handlers(trainer, self._install)
        self._install()
        try:
            yield
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt(*error.__context__.args) from None
            raise
        except RuntimeError as error:
            # The signal may have been for all processes, and workers that were not forked die of it.
            if not self._stop or not self.received or "DataLoader worker" not in str(error):
                raise
        finally:
            _set(before)
            self._trainer = None

    def _install(self) -> None:
        _set({number: self._handle for number, before in self._before.items() if before != signal.SIG_IGN})

    def raise_if_received(self, ranks: Ranks, kept: Callable[[], str]) -> None:
        """End the work on every rank if one of them has received a signal. All ranks wait for each other here.

        Args:
            ranks: whose last shards are written now.
            kept: says what is done.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            Terminated: after SIGTERM.
        """
        received = [number for number in ranks.gather(self.received) if number]
        if not received:
            return
        number = self.received or received[0]
        message = f"featurizing stopped by {number.name}: {kept()}; call featurize again to go on"
        if number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        if ranks.rank == 0:
            print(message, file=sys.stderr)  # Python says nothing of an exit with a number
        raise Terminated(message)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        number, last = signal.Signals(signum), self.received
        self.received = number
        if os.getpid() != self._process:  # a worker, forked; it ends when the loader wants it to
            if number == signal.SIGTERM and (self._stop is None or last == number):
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        if last is None and self._trainer is not None and self._trainer.strategy.launcher is not None:
            self._trainer.strategy.launcher.kill(signal.SIGTERM)  # for the processes that it has begun
        before = self._before[number]
        if callable(before) and before is not signal.default_int_handler:
            before(signum, frame)
            if self._stop is None:
                return
        if self._stop is None or last == number == signal.SIGINT:
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated("ended by SIGTERM")
        self._stop.requested = True
        if last is None:
            how = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            rank_zero_info(f"{number.name} received: featurizing stops when the shard in work is written{how}")


def _set(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
        for number, handler in handlers.items():
            if handler is not None:  # None is one that Python does not know, and cannot restore
                signal.signal(number, handler)
