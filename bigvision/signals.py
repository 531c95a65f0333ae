"""What signals ask of a run: to save and go on, or to save and stop. Imports nothing heavy: it listens before all else."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
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
    """What this process was asked for. There is one: :data:`SIGNALS`."""

    stop: str = ""
    """The name of the signal that asked to stop; empty where none did."""
    save: bool = False
    """Whether a save was asked for; whoever reads it sets it back."""
    alone: bool = False
    """Whether a stop ends the process at once: the ranks have not met, so there is nothing to save and nobody to agree with."""

    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        """What answered before; empty where this does not listen."""

    def listen(self) -> bool:
        """Answer signals from now on; returns whether it did not before. Only the main thread can, others hear nothing."""
        if self.before or threading.current_thread() is not threading.main_thread():
            return False
        self.stop, self.save, self.alone = "", False, True
        # Whoever started this process may have held them, and a child inherits that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP, SAVE})
        for number in (*STOP, SAVE):
            self.before[number] = signal.signal(number, self._heard)
        return True

    def restore(self) -> None:
        """Answer them as before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before, self.alone = {}, False

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE:
            self.save = True
        elif self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C
        elif not self.stop:
            self.stop = signal.Signals(number).name
            if self.alone:
                # An import that tries something and passes over all errors passes over this one, too.
                _thread.start_new_thread(_insist, ())
                raise SystemExit(_leave(self.stop))


SIGNALS = Signals()


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
def while_alone() -> Iterator[None]:
    """Let a stop in here end the process also where the main thread waits in code that is not Python.

    That code, the wait for other ranks, lets no handler run. A thread hears of the signal by the interpreter's wake-up pipe.
    """
    if not SIGNALS.before or threading.current_thread() is not threading.main_thread():
        yield
        return
    SIGNALS.alone = True
    inlet, outlet = os.pipe()
    os.set_blocking(outlet, False)
    before = signal.set_wakeup_fd(outlet, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(inlet,), name="signals", daemon=True).start()
    try:
        yield
    finally:
        SIGNALS.alone = False
        signal.set_wakeup_fd(before)
        os.close(outlet)


def _watch(inlet: int) -> None:
    while number := os.read(inlet, 1):
        if number[0] in STOP:
            time.sleep(PATIENCE)
            if SIGNALS.alone:
                os._exit(Exit.STOPPED if SIGNALS.stop else _leave(signal.Signals(number[0]).name))
    os.close(inlet)


def _insist() -> None:
    """End the process, unless it has ended, has begun to listen anew or its rank has met the others meanwhile."""
    time.sleep(PATIENCE)
    if SIGNALS.alone and SIGNALS.stop:
        os._exit(Exit.STOPPED)


def _leave(name: str) -> int:
    """Say that the run ends before it began; returns the exit code of that."""
    print(f"stopped by {name} before the run began: there is nothing new to save", file=sys.stderr, flush=True)
    return Exit.STOPPED
