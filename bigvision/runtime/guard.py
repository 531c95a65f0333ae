"""Ends a rank that is lost and cannot end itself, because native code holds its interpreter.

A program of its own (``python guard.py ...``), started by the watchdog beside a rank on CUDA: while native code holds the
interpreter lock, no thread of the rank runs Python. It imports the standard library alone, so it starts in milliseconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GONE = "is gone"
STATES = {
    "T": "is stopped by a signal", "t": "is held by a debugger", "D": "waits for a disk or a network file system",
    "Z": GONE, "X": GONE,
}  # fmt: skip
"""What the state letters of /proc mean for a process that does not answer."""
TURNS = 20
"""How often the guard looks whether the rank has ended by itself, before SIGKILL ends it."""


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; none where there is no such process of this host, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def start_time(pid: int) -> str:
    """Return when a process of this host started, as /proc counts it; "" where there is no /proc."""
    return _stat(pid)[19] if _stat(pid) else ""


def process_state(pid: int, born: str = "") -> str:
    """Return one of the words of `STATES` for a process of this host, or "" where nothing is wrong with it.

    *born* is its `start_time`: another process may have got its number.
    """
    fields = _stat(pid)
    return STATES.get(fields[0], "") if fields and born in ("", fields[19]) else GONE


class Guard:
    """Starts the program beside this rank, and reports to it."""

    def __init__(self, rank: int, pulse: float, grace: float) -> None:
        """For the arguments see `main`."""
        self._before = _end_at_hangup()
        end_signal = signal.SIGKILL if self._before is None else signal.SIGHUP
        command = [sys.executable, "-I", "-S", __file__, *map(str, (rank, int(end_signal), pulse, grace))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert self._process.stdin is not None
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def report(self, fault: str, peers: list[tuple[int, str, str]]) -> None:
        """Pass on the *fault* that is known, if any, and (pid, start time, sentence for its end) of each rank of this host."""
        with suppress(OSError):  # it has ended, or has not read for long
            os.write(self._pipe, (json.dumps({"fault": fault, "peers": peers}) + "\n").encode())

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()
        if self._before is not None:
            _set_handler(signal.SIGHUP, self._before)


def needed() -> bool:
    """Whether this rank may wait in a driver that holds the interpreter; gloo never does."""
    import torch

    return sys.platform == "linux" and torch.cuda.is_available()


def _end_at_hangup() -> int | None:
    """Make SIGHUP end this process with exit code 1 without a turn of the interpreter, where it has no handler.

    The C function ``_exit`` takes an int, as a handler does: it exits with the signal's number, which is 1. Returns the handler
    before, or None where SIGHUP has a handler already or is ignored (nohup): then it keeps that.
    """
    if signal.SIGHUP != 1 or signal.getsignal(signal.SIGHUP) != signal.SIG_DFL:
        return None
    return _set_handler(signal.SIGHUP, ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p).value or 0)


def _set_handler(number: int, handler: int) -> int:
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    return library.signal(number, handler) or 0


def main(rank: int, end_signal: int, pulse: float, grace: float) -> None:
    """Watch the parent process, *rank*, until it ends. Each line of standard input is its latest report (see `Guard.report`).

    *pulse* is the seconds between two reports; *grace* those after a fault until a rank that no longer reports gets
    *end_signal*, and from that to SIGKILL.
    """
    rank_pid = os.getppid()
    report: dict[str, Any] = {"fault": "", "peers": []}
    reported, fault, fault_since, buffer = time.monotonic(), "", 0.0, b""
    while os.getppid() == rank_pid:
        if select.select([0], [], [], pulse)[0]:
            data = os.read(0, 1 << 16)
            if not data:
                return  # the rank has left
            *lines, buffer = (buffer + data).split(b"\n")
            if lines:
                report, reported = json.loads(lines[-1]), time.monotonic()
        gone = [words for pid, born, words in report["peers"] if process_state(pid, born) == GONE]
        found = report["fault"] or "; ".join(gone)
        if not (fault and found):
            # The first fault counts: the ranks that it ends are gone after it.
            fault, fault_since = found, time.monotonic()
        now = time.monotonic()
        if fault and now - max(fault_since, reported) > grace:
            reason = "native code held the interpreter of this rank, which was ended (limits.grace)"
            os.write(2, f"error: rank {rank}: {fault}; {reason}\n".encode(errors="replace"))
            os.kill(rank_pid, end_signal)
            # In turns, not in one sleep: a machine that gives nobody a turn for seconds must not make a -9 of the exit code 1.
            for _ in range(TURNS):
                time.sleep(grace / TURNS)
                if os.getppid() != rank_pid:
                    return
            os.kill(rank_pid, signal.SIGKILL)
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
