"""What ranks report to each other beside the collectives, and the words for a run that does not get on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from bigvision.runtime.guard import GONE, process_state, start_time
from bigvision.runtime.identity import Identity

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


def this_process() -> dict[str, Any]:
    """What identifies this process to the other ranks. Ranks with the same ``sight`` can look at it in /proc."""
    try:
        sight = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        sight = ""
    # Hosts may have one name, as two containers of an image do.
    node, pid = os.environ.get("GROUP_RANK", ""), os.getpid()
    return {"host": socket.gethostname(), "node": node, "pid": pid, "born": start_time(pid), "sight": sight}


def details(thread: int) -> dict[str, Any]:
    """Where *thread* is, and how many collectives were begun in each group: what tells who waits for whom."""
    begun = {}
    groups: list[Any] = list(distributed_c10d._world.pg_map)
    for group in groups:
        try:
            members = zlib.crc32(repr(dist.get_process_group_ranks(group)).encode())
            begun[f"{group.group_name}/{members}"] = group._get_sequence_number_for_group()
        except (RuntimeError, KeyError, AttributeError):
            continue  # being made or taken down
    frame: Any = sys._current_frames().get(thread)
    while frame is not None and frame.f_code.co_filename.endswith(("/torch/_ops.py", "/threading.py")):
        frame = frame.f_back
    if frame is None:
        return {"begun": begun, "waits": None, "where": ""}
    path = frame.f_code.co_filename
    where = f"{frame.f_code.co_name} ({'/'.join(path.split('/')[-2:])}:{frame.f_lineno})"
    # A backward pass may compute or wait.
    waits = None if path.endswith("/torch/autograd/graph.py") else "/torch/distributed/" in path
    return {"begun": begun, "waits": waits, "where": where}


def diagnose(beats: Heartbeats, mine: dict[str, Any]) -> str:
    """Return which ranks are slow or missing, in words.

    Args:
        mine: what this rank reports of itself, with :func:`details`.
    """
    if beats.mute:
        return _without_store(beats, mine)
    missing = [rank for rank in range(beats.identity.world_size) if rank != mine["rank"] and rank not in beats.heard]
    said = [f"{_ranks(missing)} {_have(missing)} not come"] if missing else []
    if absent := missing_ranks(beats, mine):
        said.append(absent)
    if said:
        return "; ".join(said)
    places = {rank: heard.said for rank, heard in beats.heard.items()} | {mine["rank"]: mine}
    late = _late(places)
    if late:
        return "; ".join(f"rank {rank} is behind, in {describe(places[rank])}" for rank in late)
    alike: dict[str, list[int]] = {}
    for rank in sorted(places):
        alike.setdefault(describe(places[rank]), []).append(rank)
    return "no rank stands out: " + "; ".join(f"{_ranks(ranks)} in {place}" for place, ranks in alike.items())


def missing_ranks(beats: Heartbeats, mine: dict[str, Any]) -> str:
    """Return the ranks that are gone or do not answer, in words; empty where there are none."""
    found = []
    for rank, heard in sorted(beats.heard.items()):
        said = heard.said
        if said["left"]:
            continue
        state = _state(said, mine)
        if state == GONE or beats.silent(rank):
            ago = "" if state == GONE else f"silent for {time.monotonic() - heard.at:.1f} s or more, "
            found.append(f"rank {rank} {state or 'does not answer'} ({_process(said)}, {ago}last in {describe(said)})")
    return "; ".join(found)


def ended_ranks(beats: Heartbeats, mine: dict[str, Any]) -> dict[int, str]:
    """Return the ranks whose processes have certainly ended without leaving the run, each with a sentence that says so.

    Certain are a process of this host that is gone from /proc, and rank 0 where it serves the store and its port refuses
    connections. A rank that merely does not answer, stopped or behind a slow link, is not among them.
    """
    # list(): the heartbeats' thread adds to it meanwhile.
    heard = list(beats.heard.items())
    found = {rank: gone_words(rank, last, beats.patience) for rank, last in heard if _has_ended(last.said, mine)}
    if beats.refused and beats.reached and not launcher_holds_store() and 0 not in found and mine["rank"] != 0:
        main = beats.heard.get(0)
        if main is None or not main.said["left"]:
            words = gone_words(0, main, beats.patience) if main else f"rank 0 {GONE}"
            address = f"{beats.identity.address}:{beats.identity.port}"
            found[0] = f"{words}: the store at {address}, which it served, refuses connections"
    return dict(sorted(found.items()))


def local_peers(beats: Heartbeats, mine: dict[str, Any]) -> list[tuple[int, str, str]]:
    """Return (pid, start time, the sentence for its end) for each rank of this host that has not left the run."""
    heard = [(rank, last) for rank, last in list(beats.heard.items()) if _in_sight(last.said, mine) and not last.said["left"]]
    return [(last.said["pid"], last.said["born"], gone_words(rank, last, 0.0)) for rank, last in heard]


def gone_words(rank: int, last: Heard, fresh: float) -> str:
    """Return the sentence that reports the end of a rank's process, with its place if that is younger than *fresh* seconds."""
    place = f", last in {describe(last.said)}" if time.monotonic() - last.at < fresh else ""
    return f"rank {rank} {GONE} ({_process(last.said)}{place})"


def store_lost(beats: Heartbeats, mine: dict[str, Any]) -> str:
    """Return which rank's end took the store along, in words; empty while it answers."""
    return _without_store(beats, mine) if beats.mute else ""


def _without_store(beats: Heartbeats, mine: dict[str, Any]) -> str:
    address = f"{beats.identity.address}:{beats.identity.port}"
    main = beats.heard.get(0)
    if not beats.reached:
        holder = "the launcher of rank 0" if launcher_holds_store() else "rank 0"
        return f"{holder} does not answer at {address}: it has not come, or cannot be reached from here"
    since = f"since {beats.silence:.1f} s"
    if not launcher_holds_store():
        state = (main and _state(main.said, mine)) or "does not answer"
        who = f" ({_process(main.said)})" if main else ""
        return f"rank 0{who} {state}: the store of the ranks at {address}, which it holds, does not answer {since}"
    there = [rank for rank, heard in sorted(beats.heard.items()) if main and _host(heard.said) == _host(main.said)]
    if main is None or _host(main.said) == _host(mine):
        return f"the launcher of rank 0, which holds the store of the ranks at {address}, does not answer {since}"
    return f"{_ranks(there)} on host {main.said['host']} cannot be reached: the store at {address} does not answer {since}"


def _late(places: dict[int, dict[str, Any]]) -> list[int]:
    """The ranks for which the others wait: they came less far, began fewer collectives, or are not in one."""
    most = max(said["count"] for said in places.values())
    if late := [rank for rank, said in places.items() if said["count"] < most]:
        return sorted(late)
    busy = {rank for rank, said in places.items() if said.get("waits") is False}
    begun: Counter[str] = Counter()
    for said in places.values():
        begun |= Counter(said.get("begun", {}))
    fewer = {r for r, said in places.items() if any(n < begun[group] for group, n in said.get("begun", {}).items())}
    if not busy or len(busy) == len(places):
        return sorted(fewer)
    # The ranks of a pipeline exchange unlike often; code that waits may look busy.
    return sorted(busy & fewer or busy)


def describe(said: dict[str, Any]) -> str:
    """Where a rank is in its run, as a noun: "step 7", "the evaluation after step 7, at its data"."""
    phase, step = said["phase"], said["step"]
    words = {"start": "the start", "step": f"step {step}", "save": f"the saving of step {step}"}
    place = words.get(phase) or f"the evaluation after step {step}"
    place += ", without its data yet" if said["data"] else ""
    place += f", at {said['where']}" if said.get("where") else ""
    return f"{place}, and has left" if said["left"] else place


def _state(said: dict[str, Any], mine: dict[str, Any]) -> str:
    """What is wrong with a process of this host; empty where that cannot be seen."""
    return process_state(said["pid"], said["born"]) if _in_sight(said, mine) else ""


def _in_sight(said: dict[str, Any], mine: dict[str, Any]) -> bool:
    return bool(mine["sight"]) and said["sight"] == mine["sight"]


def _has_ended(said: dict[str, Any], mine: dict[str, Any]) -> bool:
    return not said["left"] and _state(said, mine) == GONE


def _host(said: dict[str, Any]) -> tuple[str, str]:
    return said["host"], said["node"]


def _process(said: dict[str, Any]) -> str:
    return f"process {said['pid']} on host {said['host']}"


def _ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def _have(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
