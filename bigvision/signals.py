"""What signals ask of a run: to save and go on, or to save and stop. Imports nothing heavy: it listens before all else.

The training loop reads `SIGNALS.stop` and `SIGNALS.save`, and agrees on them with the other ranks. Until the ranks have met
there is nobody to agree with and nothing to save, so that a stop ends the process at once: the handler raises SystemExit. That
may come to nothing: an import may catch every error, and the wait for other ranks is native code that lets no handler run. So
a thread hears of signals by the interpreter's wake-up pipe, to which C code writes, and ends the process after `PATIENCE`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from bigvision.errors import Exit

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Of schedulers, of Slurm's ``--signal=USR1@120``, and of a terminal."""
SAVE = signal.SIGUSR2
PATIENCE = 2.0
"""Seconds that the main thread has to end the process in an orderly way."""


class Signals:
    """What this process was asked for. There is one: :data:`SIGNALS`. Only the main thread calls its methods."""

    stop: str = ""
    """The name of the signal that asked to stop; empty where none did."""
    save: bool = False
    """Whether a save was asked for; whoever reads it sets it back."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        """What answered before; empty where this does not listen."""
        self._at_once: tuple[threading.Event, int, int] | None = None
        """While a stop ends the process at once: an event that ends this, the wake-up pipe, and the one before it."""

    def listen(self) -> bool:
        """Answer signals from now on, a stop at once; returns whether it did not before. Only the main thread can listen."""
        if self.before or threading.current_thread() is not threading.main_thread():
            return False
        self.stop, self.save = "", False
        self.stop_at_once(True)
        # Whoever started this process may have held them, and a child inherits that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP, SAVE})
        for number in (*STOP, SAVE):
            self.before[number] = signal.signal(number, self._handle)
        return True

    def restore(self) -> None:
        """Answer them as before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
        self.stop_at_once(False)

    def stop_at_once(self, begins: bool) -> None:
        """From now on a stop ends the process at once; or, at the end of that, it is left to the run."""
        if begins and self._at_once is None:
            met = threading.Event()
            inlet, outlet = os.pipe()
            os.set_blocking(outlet, False)
            self._at_once = met, outlet, signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)
            threading.Thread(target=_end_at_a_stop, args=(inlet, met), name="signals", daemon=True).start()
        elif not begins and self._at_once is not None:
            (met, outlet, before), self._at_once = self._at_once, None
            met.set()
            signal.set_wakeup_fd(before)
            os.close(outlet)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self.save = True
        elif self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C
        elif not self.stop:
            self.stop = signal.Signals(number).name
            if self._at_once is not None:
                raise SystemExit(_stopped(self.stop))


SIGNALS = Signals()


def _end_at_a_stop(inlet: int, met: threading.Event) -> None:
    """End the process `PATIENCE` after a stop, unless the ranks have *met* by then."""
    while number := os.read(inlet, 1):
        if number[0] in STOP and not met.wait(PATIENCE):
            os._exit(Exit.STOPPED if SIGNALS.stop else _stopped(signal.Signals(number[0]).name))
    os.close(inlet)


def _stopped(name: str) -> int:
    """Report a stop before the run began; returns its exit code."""
    print(f"stopped by {name} before the run began: there is nothing new to save", file=sys.stderr, flush=True)
    return Exit.STOPPED


@contextmanager
def listening() -> Iterator[None]:
    """Answer signals in here; a program that answers them already goes on to."""
    begun = SIGNALS.listen()
    try:
        yield
    finally:
        if begun:
            SIGNALS.restore()


@contextmanager
def until_ranks_meet() -> Iterator[None]:
    """Let a stop in here end the process at once, and leave it to the run afterwards."""
    if not SIGNALS.before or threading.current_thread() is not threading.main_thread():
        yield
        return
    SIGNALS.stop_at_once(True)
    try:
        yield
    finally:
        SIGNALS.stop_at_once(False)
