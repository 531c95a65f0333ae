"""Writes down what the ranks do to the disk, call by call, in the order of all of them."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoint.system_calls import Call, intercept


@dataclass(frozen=True)
class Event:
    """A call that was made, or a note that was taken, at its place in the order of all ranks."""

    when: int
    rank: int
    call: Call | None
    result: Any = None
    note: Any = None

    @property
    def changes(self) -> bool:
        """Whether the disk may hold something else after it."""
        return self.call is not None and self.call.name != "close" and not self.call.reads


class Recorder:
    """Performs one call at a time over all ranks and threads, and writes each down."""

    def __init__(self, rank: int, clock: int) -> None:
        self.rank = rank
        self.clock = clock
        self.events: list[Event] = []
        self.thread = threading.Lock()

    @contextmanager
    def turn(self) -> Iterator[int]:
        # A thread's lock, for flock is the process's; and flock, for the ranks are processes.
        with self.thread:
            fcntl.flock(self.clock, fcntl.LOCK_EX)
            try:
                now = int.from_bytes(os.pread(self.clock, 8, 0), "little")
                os.pwrite(self.clock, (now + 1).to_bytes(8, "little"), 0)
                yield now
            finally:
                fcntl.flock(self.clock, fcntl.LOCK_UN)

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        with self.turn() as now:
            # The disk is a model here; waiting for the real one would make up most of a test's time.
            result = None if call.name == "fsync" else perform()
            self.events.append(Event(now, self.rank, call, result))
            return result

    def note(self, note: Any) -> None:
        with self.turn() as now:
            self.events.append(Event(now, self.rank, None, note=note))


@contextmanager
def record(root: Path, clock: Path, rank: int = 0) -> Iterator[Recorder]:
    """Write down what this process does inside *root*; *clock* is a file that the ranks share, outside of it."""
    descriptor = os.open(clock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        recorder = Recorder(rank, descriptor)
        with intercept(root, recorder):
            yield recorder
    finally:
        os.close(descriptor)
