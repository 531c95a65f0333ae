"""What ranks report to each other beside the collectives: how far each has come, and the first fault."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from bigvision.runtime.environment import Identity

SILENT = 5.0
"""Pulses without news after which a rank is silent, and no less than a second: a busy host may be late."""
CONNECT = timedelta(seconds=5)


@dataclass
class Heard:
    """The last news of a rank."""

    said: dict[str, Any]
    at: float
    """When they came, on this rank's clock."""


class Heartbeats:
    """Publishes where this rank is in the store by which the ranks found each other, over a connection of its own.

    All talking is done in a thread, which may wait for an answer for ever: what it knows is read from attributes. In quiet
    times a rank writes one key and looks for another each pulse; it reads the others' only when it is :attr:`curious`.
    """

    def __init__(self, identity: Identity, pulse: float, say: Callable[[bool], dict[str, Any]]) -> None:
        """Args:
        pulse: seconds between two rounds.
        say: what to publish; told whether the details are wanted, which take longer.
        """
        self.identity, self.pulse, self.say = identity, pulse, say
        self.heard: dict[int, Heard] = {}
        self.fault: dict[str, Any] | None = None
        """The first fault on any rank: "rank" (who reported it), "text", "end" (whether a limit ran out: all end at once)."""
        self.answered = time.monotonic()
        """When the store last did."""
        self.reached = False
        """Whether it ever did."""
        self.refused = False
        """Whether the store's port refuses connections: on a host that can be reached, the process that served it has ended."""
        self.curious = False
        self.news = threading.Event()
        """Set when there is a fault."""
        self._said, self._rounds = 0, 0
        self._reading_since = math.inf
        self._ready: set[int] = set()
        self._report: dict[str, Any] | None = None
        self._wake, self._closing = threading.Event(), False
        self._prefix = _prefix(identity)
        self._thread = threading.Thread(target=self._talk, name="heartbeats", daemon=True)
        self._thread.start()

    @property
    def holds_store(self) -> bool:
        """Whether the store ends with this rank; otherwise its launcher has it, or another rank."""
        return self.identity.rank == 0 and not launcher_holds_store()

    @property
    def patience(self) -> float:
        """Seconds without news after which a rank, or the store, is silent."""
        return max(1.0, SILENT * self.pulse)

    @property
    def silence(self) -> float:
        """Seconds for which the store did not answer."""
        return time.monotonic() - self.answered

    @property
    def mute(self) -> bool:
        """Whether the store does not answer any more."""
        return self.silence > self.patience

    def silent(self, rank: int) -> bool:
        """Whether nothing was heard of *rank* for long, while the store answers and is asked for it."""
        return self.answered - max(self.heard[rank].at, self._reading_since) > self.patience

    def report(self, text: str, end: bool, patience: float) -> dict[str, Any]:
        """Say that something went wrong; returns what was said first of all, by this rank or another.

        Args:
            end: all ranks have to end.
            patience: seconds to wait for the store.
        """
        mine = {"rank": self.identity.rank, "text": text, "end": end}
        self._report = mine
        self.hurry(patience)
        return self.fault or mine

    def hurry(self, patience: float) -> None:
        """Have a whole round now, and wait for its end, or for *patience* seconds."""
        # The one under way may have passed what it is wanted for.
        goal, deadline = self._rounds + 2, time.monotonic() + patience
        while self._rounds < goal and time.monotonic() < deadline and self._thread.is_alive():
            self._wake.set()
            time.sleep(min(0.01, self.pulse))

    def wake(self) -> None:
        """Begin a round now, without waiting for it."""
        self._wake.set()

    def close(self) -> None:
        """Publish the last state, if the store still takes it."""
        self._closing = True
        self._wake.set()
        self._thread.join(1.0)

    def _talk(self) -> None:
        store = None
        last = False
        while not last:
            last = self._closing
            with contextlib.suppress(Exception):
                try:
                    store = store or self._connect()
                    self._exchange(store)
                except Exception:
                    # Gone, or not there yet.
                    store = None
                    raise
            self._rounds += 1
            if not last:
                self._wake.wait(self.pulse)
                self._wake.clear()

    def _connect(self) -> Any:
        address, port = self.identity.address, self.identity.port
        # TCPStore fills the screen when nobody listens.
        try:
            socket.create_connection((address, port), timeout=max(1.0, self.pulse)).close()
        except OSError as error:
            self.refused = isinstance(error, ConnectionRefusedError)
            raise
        self.refused = False
        return dist.TCPStore(address, port, None, False, CONNECT, wait_for_workers=False)

    def _exchange(self, store: Any) -> None:
        self._said += 1
        said = self.say(self.curious) | {"number": self._said}
        store.set(self._key(self.identity.rank), json.dumps(said))
        if self._report is not None:
            self._found(store.compare_set(self._key("fault"), "", json.dumps(self._report)))
            self._report = None
        elif self.fault is None and store.check([self._key("fault")]):
            self._found(store.get(self._key("fault")))
        if self.curious:
            self._reading_since = min(self._reading_since, time.monotonic())
            self._read(store)
        else:
            self._reading_since = math.inf
        self.answered, self.reached = time.monotonic(), True

    def _read(self, store: Any) -> None:
        others = [rank for rank in range(self.identity.world_size) if rank != self.identity.rank]
        # Reading waits for what is not there.
        self._ready |= {rank for rank in others if rank not in self._ready and store.check([self._key(rank)])}
        ready = sorted(self._ready)
        for rank, text in zip(ready, store.multi_get([self._key(rank) for rank in ready]) if ready else []):
            said = json.loads(text)
            if rank not in self.heard or self.heard[rank].said["number"] != said["number"]:
                self.heard[rank] = Heard(said, time.monotonic())

    def _found(self, text: bytes) -> None:
        self.fault = json.loads(text)
        self.news.set()

    def _key(self, name: object) -> str:
        return f"{self._prefix}/{name}"


def launcher_holds_store() -> bool:
    """Whether the ranks' store is torchrun's own, and not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _prefix(identity: Identity) -> str:
    """Where in the store: a store may outlive a restart of the ranks, and a process may train several times in a row."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = (identity, os.environ.get("TORCHELASTIC_RUN_ID"), attempt)
    _STARTS[place] += 1
    return f"bigvision/heartbeats/{attempt}.{_STARTS[place]}"


_STARTS: Counter[tuple[object, ...]] = Counter()
