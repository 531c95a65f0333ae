"""Who holds a run up: from what the ranks last said of themselves to words."""

from __future__ import annotations

import os
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from bigvision.runtime.heartbeats import Heartbeats, launcher_holds_store

_GONE = "is gone"
STATES = {
    "T": "is stopped by a signal",
    "t": "is held by a debugger",
    "D": "waits for a disk or a network file system",
    "Z": _GONE,
    "X": _GONE,
}
"""What /proc says of a process that does not answer."""


def whereabouts() -> dict[str, Any]:
    """Which process this is, for others to look at it."""
    try:
        sight = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        sight = ""
    # Hosts may have one name, as two containers of an image do.
    return {"host": socket.gethostname(), "node": os.environ.get("GROUP_RANK", ""), "pid": os.getpid(), "sight": sight}


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


def accuse(beats: Heartbeats, mine: dict[str, Any]) -> str:
    """Who is slow or missing, in words.

    Args:
        mine: what this rank says of itself, with :func:`details`.
    """
    if beats.mute:
        return _without_store(beats, mine)
    missing = [rank for rank in range(beats.identity.world_size) if rank != mine["rank"] and rank not in beats.heard]
    said = [f"{_ranks(missing)} {_have(missing)} not come"] if missing else []
    if absent := absentees(beats, mine):
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


def absentees(beats: Heartbeats, mine: dict[str, Any]) -> str:
    """The ranks that are gone or of which nothing is heard, in words; empty where there are none."""
    found = []
    for rank, heard in sorted(beats.heard.items()):
        said = heard.said
        if said["left"]:
            continue
        state = _state(said, mine)
        if state == _GONE or beats.silent(rank):
            ago = "" if state == _GONE else f"silent for {time.monotonic() - heard.at:.1f} s or more, "
            found.append(f"rank {rank} {state or 'does not answer'} ({_process(said)}, {ago}last in {describe(said)})")
    return "; ".join(found)


def store_lost(beats: Heartbeats, mine: dict[str, Any]) -> str:
    """Who took the store along, in words; empty while it answers."""
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
    if not mine["sight"] or said["sight"] != mine["sight"]:
        return ""
    try:
        text = Path(f"/proc/{said['pid']}/stat").read_text()
    except OSError:
        return _GONE
    return STATES.get(text.rpartition(")")[2].split()[0], "")


def _host(said: dict[str, Any]) -> tuple[str, str]:
    return said["host"], said["node"]


def _process(said: dict[str, Any]) -> str:
    return f"process {said['pid']} on host {said['host']}"


def _ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"


def _have(ranks: list[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
