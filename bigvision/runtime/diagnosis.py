"""Explains a hang: which ranks are gone, silent or behind, from their last reports, which `watchdog.py` gathers. No state."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed import distributed_c10d

from bigvision.runtime.guard import GONE, process_state, start_time
from bigvision.runtime.rendezvous import Identity, launcher_holds_store

Report = dict[str, Any]
"""What a rank publishes: `this_process`, the phase, step and count of its beats, whether it waits for data and whether it has
left the run; also its `current_place` when somebody asks."""


class Heard(NamedTuple):
    """The last report of a rank."""

    report: Report
    at: float
    """When it came, on this rank's clock."""


@dataclass
class News:
    """What this rank knows of the others."""

    identity: Identity
    process: Report
    """This process, as `this_process` describes it."""
    patience: float
    """Seconds without news after which a rank, or the store, is silent."""
    heard: dict[int, Heard] = field(default_factory=dict)
    answered: float = field(default_factory=time.monotonic)
    """When the store last did."""
    reached: bool = False
    """Whether it ever did."""
    refused: bool = False
    """Whether the store's port refuses connections: on a host that can be reached, the process that served it has ended."""
    reading_since: float = math.inf
    """Since when the reports of the others are read."""

    def silent(self, rank: int) -> bool:
        """Whether nothing was heard of *rank* for long, while the store answers and is asked for it."""
        return self.answered - max(self.heard[rank].at, self.reading_since) > self.patience

    def sees(self, report: Report) -> bool:
        """Whether /proc shows the process of *report*: one of this host, and of this container."""
        return bool(self.process["sight"]) and report["sight"] == self.process["sight"]

    def state(self, report: Report) -> str:
        """What is wrong with the process of *report*, in words; empty where that cannot be seen."""
        return process_state(report["pid"], report["born"]) if self.sees(report) else ""


def this_process() -> Report:
    """What identifies this process to the other ranks. Ranks with the same ``sight`` can look at it in /proc."""
    try:
        sight = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        sight = ""
    # Two hosts may have one name, as containers of an image do.
    host, pid = [socket.gethostname(), os.environ.get("GROUP_RANK", "")], os.getpid()
    return {"host": host, "pid": pid, "born": start_time(pid), "sight": sight}


def current_place(thread: int) -> Report:
    """Where *thread* is, and how many collectives were begun in each group: it shows who waits for whom."""
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


def diagnose(news: News, mine: Report) -> str:
    """Return which ranks are slow or missing, in words. *mine* is this rank's own report, with `current_place`."""
    if lost := store_lost(news):
        return lost
    rank, size = news.identity.rank, news.identity.world_size
    absent = [other for other in range(size) if other != rank and other not in news.heard]
    have = "has" if len(absent) == 1 else "have"
    if found := [*([f"{_ranks(absent)} {have} not come"] if absent else []), *missing_ranks(news)]:
        return "; ".join(found)
    reports = {other: heard.report for other, heard in news.heard.items()} | {rank: mine}
    if late := _late(reports):
        return "; ".join(f"rank {other} is behind, in {describe(reports[other])}" for other in late)
    alike: dict[str, list[int]] = {}
    for other in sorted(reports):
        alike.setdefault(describe(reports[other]), []).append(other)
    return "no rank stands out: " + "; ".join(f"{_ranks(ranks)} in {place}" for place, ranks in alike.items())


def missing_ranks(news: News) -> list[str]:
    """Return a sentence for each rank that has come and is gone, or does not answer."""
    found = []
    for rank, (report, at) in sorted(news.heard.items()):
        state = news.state(report)
        if not report["left"] and (state == GONE or news.silent(rank)):
            ago = "" if state == GONE else f"silent for {time.monotonic() - at:.1f} s or more, "
            found.append(f"rank {rank} {state or 'does not answer'} ({_process(report)}, {ago}last in {describe(report)})")
    return found


def ended_ranks(news: News) -> list[str]:
    """Return a sentence for each rank whose process has certainly ended without leaving the run.

    Certain are a process of this host that is gone from /proc, and rank 0 where it serves the store and its port refuses
    connections. A rank that merely does not answer, stopped or behind a slow link, is not among them.
    """
    found = {
        rank: _gone(rank, last, news.patience)
        for rank, last in news.heard.items()
        if not last.report["left"] and news.state(last.report) == GONE
    }
    main = news.heard.get(0)
    lost = news.refused and news.reached and not launcher_holds_store()
    if lost and 0 not in found and news.identity.rank != 0 and (main is None or not main.report["left"]):
        words = _gone(0, main, news.patience) if main else f"rank 0 {GONE}"
        address = f"{news.identity.address}:{news.identity.port}"
        found[0] = f"{words}: the store at {address}, which it served, refuses connections"
    return [found[rank] for rank in sorted(found)]


def local_peers(news: News) -> list[tuple[int, str, str]]:
    """Return (pid, start time, the sentence for its end) for each rank of this host that has not left the run."""
    return [
        (last.report["pid"], last.report["born"], _gone(rank, last, 0.0))
        for rank, last in news.heard.items()
        if news.sees(last.report) and not last.report["left"]
    ]


def _gone(rank: int, last: Heard, fresh: float) -> str:
    """The sentence for the end of a rank's process, with its place if that is younger than *fresh* seconds."""
    place = f", last in {describe(last.report)}" if time.monotonic() - last.at < fresh else ""
    return f"rank {rank} {GONE} ({_process(last.report)}{place})"


def store_lost(news: News) -> str:
    """Return whose end or silence took the store along, in words; empty while the store answers."""
    silence = time.monotonic() - news.answered
    if silence <= news.patience:
        return ""
    address, main = f"{news.identity.address}:{news.identity.port}", news.heard.get(0)
    holder = "the launcher of rank 0" if launcher_holds_store() else "rank 0"
    if not news.reached:
        return f"{holder} does not answer at {address}: it has not come, or cannot be reached from here"
    silent = f"does not answer since {silence:.1f} s"
    if not launcher_holds_store():
        state = (main and news.state(main.report)) or "does not answer"
        who = f" ({_process(main.report)})" if main else ""
        return f"rank 0{who} {state}: the store of the ranks at {address}, which it holds, {silent}"
    if main is None or main.report["host"] == news.process["host"]:
        return f"{holder}, which holds the store of the ranks at {address}, {silent}"
    there = [rank for rank, heard in sorted(news.heard.items()) if heard.report["host"] == main.report["host"]]
    return f"{_ranks(there)} on host {main.report['host'][0]} cannot be reached: the store at {address} {silent}"


def _late(reports: dict[int, Report]) -> list[int]:
    """The ranks for which the others wait: they came less far, began fewer collectives, or are not in one."""
    most = max(report["count"] for report in reports.values())
    if late := [rank for rank, report in reports.items() if report["count"] < most]:
        return sorted(late)
    busy = {rank for rank, report in reports.items() if report.get("waits") is False}
    begun: Counter[str] = Counter()
    for report in reports.values():
        begun |= Counter(report.get("begun", {}))
    fewer = {r for r, report in reports.items() if any(n < begun[group] for group, n in report.get("begun", {}).items())}
    if not busy or len(busy) == len(reports):
        return sorted(fewer)
    # The ranks of a pipeline exchange unlike often; code that waits may look busy.
    return sorted(busy & fewer or busy)


def describe(report: Report) -> str:
    """Where a rank is in its run, as a noun: "step 7", "the evaluation after step 7, at its data"."""
    step = report["step"]
    place = {
        "start": "the start", "step": f"step {step}", "save": f"the saving of step {step}",
        "evaluate": f"the evaluation after step {step}",
    }[report["phase"]]  # fmt: skip
    place += ", without its data yet" if report["data"] else ""
    place += f", at {report['where']}" if report.get("where") else ""
    return f"{place}, and has left" if report["left"] else place


def _process(report: Report) -> str:
    return f"process {report['pid']} on host {report['host'][0]}"


def _ranks(ranks: Iterable[int]) -> str:
    names = [str(rank) for rank in ranks]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"
