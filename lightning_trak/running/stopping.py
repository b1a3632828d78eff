"""SIGTERM and Ctrl-C: the run ends at a point where nothing is lost, with a message."""

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
from lightning_trak.running.data.ranges import Stop
from lightning_trak.running.ranks import Ranks


class Terminated(SystemExit):
    """SIGTERM has ended the work. If this is not caught, the process exits with 143, the usual code for SIGTERM."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = 128 + signal.SIGTERM


class Interruption:
    """Handles SIGTERM and Ctrl-C instead of Lightning. Lightning's predict loop ignores SIGTERM and exits on Ctrl-C.

    A signal that the process ignores stays ignored. A handler of the user is called first.

    Args:
        stop: set by either signal; a second Ctrl-C ends the run at once. None: both signals end the run at once.

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
        """Handle the signals while a Trainer runs. The handlers are restored; the Trainer keeps a new signal connector.

        Raises:
            KeyboardInterrupt: when Lightning would turn it into an exit.
        """
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        self._trainer, self._before = trainer, before
        # Lightning's SIGTERM handler calls a collective on each rank at once, which may mix with those under way.
        after_signal_handlers(trainer, self._install)
        self._install()
        try:
            yield
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt(*error.__context__.args) from None
            raise
        except RuntimeError as error:
            # The signal may have gone to all processes. Workers that were not forked die from it.
            if not self._stop or not self.received or "DataLoader worker" not in str(error):
                raise
        finally:
            _set(before)
            self._trainer = None

    def _install(self) -> None:
        _set({number: self._handle for number, before in self._before.items() if before != signal.SIG_IGN})

    def raise_if_received(self, ranks: Ranks, kept: Callable[[], str]) -> None:
        """End the work on every rank if any rank has received a signal. All ranks wait for each other here.

        Args:
            ranks: the ranks, which have written their last shards.
            kept: gives the part of the message that says which work is done.

        Raises:
            KeyboardInterrupt: after Ctrl-C.
            Terminated: after SIGTERM.
        """
        received = [number for number in ranks.gather(self.received) if number]
        if not received:
            return
        number = self.received or received[0]
        message = f"featurizing stopped by {number.name}: {kept()}; call featurize again to continue"
        if number == signal.SIGINT:
            raise KeyboardInterrupt(message)
        if ranks.rank == 0:
            print(message, file=sys.stderr)  # Python prints nothing for an exit with a number
        raise Terminated(message)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        number, last = signal.Signals(signum), self.received
        self.received = number
        if os.getpid() != self._process:  # a forked worker, which the loader ends
            if number == signal.SIGTERM and (self._stop is None or last == number):
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        if last is None and self._trainer is not None and self._trainer.strategy.launcher is not None:
            self._trainer.strategy.launcher.kill(signal.SIGTERM)  # to the processes that it has started
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
            rank_zero_info(f"{number.name} received: featurizing stops when the current shard is written{how}")


def _set(handlers: dict[signal.Signals, Any]) -> None:
    if threading.current_thread() is threading.main_thread():  # Python allows it only here
        for number, handler in handlers.items():
            if handler is not None:  # None: a handler not set by Python, which cannot restore it
                signal.signal(number, handler)
