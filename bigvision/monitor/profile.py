"""``monitor.profile``: a trace of some steps on each rank, and a table of where their time went."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch.autograd.profiler import record_function

from bigvision import checkpoint
from bigvision.config import Config
from bigvision.monitor.monitor import Monitor
from bigvision.monitor.trace import CATEGORIES, COMMUNICATION, memory_peak, summarise
from bigvision.runtime import Runtime, Watchdog, gather_json

FOLDER = "profile"
"""In the output folder: rank-N.json.gz, summary.json and, with ``monitor.memory_snapshot``, memory-rank-N.json."""
SHOWN = 6
"""Groups of allocations that are printed; the file has all."""


class Profile:
    """Records the steps that ``monitor.profile`` names. Every rank has one, and calls all of its methods at the same steps.

    A fault of the profiler is reported and ends no run.
    """

    def __init__(self, config: Config, runtime: Runtime, monitor: Monitor, watch: Watchdog, steps: int) -> None:
        """Of a run of so many *steps*."""
        self.runtime, self.monitor, self.watch = runtime, monitor, watch
        self.folder = Path(config.out) / FOLDER
        first, last = config.monitor.profile or (0, -1)
        self.asked = range(first, last + 1)
        if first > steps:
            monitor.say(f"monitor.profile: [{first}, {last}] begins after the run's last step, {steps}: nothing is recorded")
        self.memory = config.monitor.memory_snapshot
        self.torch: Any = None
        self.begun = False
        """Whether there are steps for the summary: the same on all ranks."""
        self.fault = ""
        self.range: Any = None
        self.device = {"device": torch.cuda.get_device_name(runtime.device)} if runtime.device.type == "cuda" else {}

    def before_step(self, step: int) -> None:
        """Called before a step is launched."""
        if step not in self.asked:
            self.finish()
            return
        if not self.begun:
            self._start()
        if self.torch is not None:
            self.range = record_function(f"step {step}")
            self.range.__enter__()

    def after_step(self, step: int) -> None:
        """Called when a step is launched and those before it are read: evaluations and checkpoints are no part of it."""
        if self.range is not None:
            if step == self.asked[-1]:
                self._synchronize()
            self.range.__exit__(None, None, None)
            self.range = None
        if self.begun and step == self.asked[-1]:
            self.finish()

    def finish(self) -> None:
        """End the recording, also before the last of the steps; write the traces, and print where the time went."""
        if not self.begun:
            return
        self.watch.beat("save", self.asked[-1])
        self.begun, self.asked = False, range(0)
        found = {"fault": self.fault} | self._stop()
        ranks = gather_json(found)
        if not self.runtime.is_main:
            return
        for rank, other in enumerate(ranks):
            if other["fault"]:
                self.monitor.say(f"monitor.profile: nothing is known of rank {rank}: {other['fault']}")
        timed = {rank: other["time"] for rank, other in enumerate(ranks) if other.get("time")}
        if not timed:
            return
        summary = merge(timed)
        peaks = {rank: other["memory"] for rank, other in enumerate(ranks) if other.get("memory")}
        if peaks:
            summary["memory"] = {str(rank): {k: v for k, v in peak.items() if k != "groups"} for rank, peak in peaks.items()}
        self._write("summary.json", json.dumps(summary).encode())
        for line in table(summary):
            self.monitor.say(line)
        if peaks:
            for line in memory_lines(*max(peaks.items(), key=lambda item: item[1]["peak"])):
                self.monitor.say(line)
        self.monitor.say(f"traces: {self.folder}/rank-N.json.gz, for https://ui.perfetto.dev or chrome://tracing")

    def close(self) -> None:
        """Write what this rank has recorded so far; nothing where all is written. Ranks that failed are not waited for."""
        if self.torch is not None:
            if self.range is not None:
                self.range.__exit__(None, None, None)
                self.range = None
            self._stop()

    def _start(self) -> None:
        self.begun = True
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.runtime.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        # Its log says on stderr that it starts and stops, and on the CPU that there is no GPU; what fails is raised as well.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        try:
            if torch.autograd._profiler_enabled():
                raise RuntimeError("another profiler of torch's is recording")  # it would be cancelled
            self._synchronize()
            recorder = torch.profiler.profile(activities=kinds, profile_memory=self.memory)
            recorder.start()
            self.torch = recorder
            torch.zeros((), device=self.runtime.device)  # the first kernel that is recorded waits for the recorder's buffers
            self._synchronize()
        except Exception as error:
            self.fault = _line(error)

    def _stop(self) -> dict[str, Any]:
        """End the recording and write this rank's files; returns what the summary needs of it."""
        recorder, self.torch = self.torch, None
        if recorder is None:
            return {}
        rank, found = self.runtime.rank, dict[str, Any]()
        try:
            recorder.stop()
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                recorder.export_chrome_trace(file.name)
                text = Path(file.name).read_bytes()
            # The least compression: a tenth of the size, in a third of the time of the usual one.
            self._write(f"rank-{rank}.json.gz", gzip.compress(text, 1, mtime=0))
            trace = json.loads(text)
            if (time := summarise(trace)) is not None:
                if self.device and time["device"] != "cuda":
                    raise RuntimeError("no kernel was recorded: another profiler, or the system's permissions, keep CUPTI off")
                found["time"] = time | self.device
            if self.memory and (peak := memory_peak(trace)) is not None:
                found["memory"] = peak
                self._write(f"memory-rank-{rank}.json", json.dumps(peak).encode())
        except Exception as error:
            found["fault"] = _line(error)
        return found

    def _write(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.replace(self.folder / name, data)

    def _synchronize(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def merge(ranks: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The summaries of all *ranks* as one, with the mean over them. Slowest is the rank that waits least for the others."""
    slowest = max(ranks, key=lambda rank: ranks[rank]["step"] - ranks[rank]["categories"][COMMUNICATION])
    return {
        "steps": next(iter(ranks.values()))["steps"],
        "step": fmean(found["step"] for found in ranks.values()),
        "categories": {name: fmean(found["categories"][name] for found in ranks.values()) for name in CATEGORIES},
        "hidden": fmean(found["hidden"] for found in ranks.values()),
        "slowest": slowest,
        "ranks": {str(rank): found for rank, found in ranks.items()},
    }


def table(summary: dict[str, Any]) -> list[str]:
    """*summary* as lines: milliseconds of a step and shares of it, of the mean of all ranks and of the slowest rank."""
    steps, ranks = summary["steps"], summary["ranks"]
    columns = [summary] if len(ranks) == 1 else [summary, ranks[str(summary["slowest"])]]
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    heads = (
        ["ms", "share"] if len(ranks) == 1 else [f"mean of {len(ranks)} ranks", "share", f"rank {summary['slowest']}", "share"]
    )
    rows = [[f"{span}: each", *heads]]
    named = {COMMUNICATION: "communication, exposed"}
    for name in CATEGORIES:
        values = [(column["categories"][name], column["step"]) for column in columns]
        if any(value for value, _ in values):
            rows.append(
                [named.get(name, name), *(cell for value, whole in values for cell in (f"{value:.2f}", f"{value / whole:.1%}"))]
            )
    rows.append(["step", *(cell for column in columns for cell in (f"{column['step']:.2f}", "100.0%"))])
    if any(column["hidden"] for column in columns):
        rows.append(["communication, hidden", *(cell for column in columns for cell in (f"{column['hidden']:.2f}", ""))])
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]


def memory_lines(rank: int, peak: dict[str, Any]) -> list[str]:
    """What was allocated at the peak of *rank*, in words."""
    where = f" of step {peak['step']}" if peak["step"] else ""
    lines = [f"memory of rank {rank}: at most {peak['peak'] / 2**20:.1f} MiB, in {peak['range'] or 'Python'}{where}"]
    if peak["before"] is None:
        lines[0] += ", without what was allocated before"
    else:
        lines.append(f"  {peak['before'] / 2**20:9.1f} MiB  from before these steps")
    shown = peak["groups"][:SHOWN]
    for group in shown:
        lines.append(f"  {group['bytes'] / 2**20:9.1f} MiB  {group['range']} {group['operation']}, {group['tensors']} tensors")
    if rest := peak["groups"][SHOWN:]:
        lines.append(f"  {sum(group['bytes'] for group in rest) / 2**20:9.1f} MiB  {len(rest)} other operations")
    return lines
