"""Which side is faster, and by how much: the sides take turns in one process group, so that both meet the same machine.

Each round runs every side once, in an order that is balanced over the rounds (A B C, C B A, B C A, A C B, ...), and gives one
ratio per side: its time over the baseline's in the same round. Drift of the machine cancels in the ratios and in the order. The
baseline also runs a second time under another name, as a control: its ratio shows what cannot be told apart from 1 here.

Under torchrun all ranks run the same side at the same time, and a time is that of the slowest rank.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist

Side = Callable[[], object]
"""Runs what is measured once, say one training step. It may return before the device has finished."""


@dataclass(frozen=True)
class Line:
    """One side over the baseline."""

    name: str
    milliseconds: float
    """Median time of one call."""
    quartiles: tuple[float, float]
    """Of the time of one call, in milliseconds."""
    ratio: float
    """Median over the rounds of the time over the baseline's."""
    interval: tuple[float, float]
    """Where that median lies with 95 % confidence (bootstrap over the rounds)."""
    ratio_of_medians: float


@dataclass(frozen=True)
class Report:
    question: str
    baseline: str
    lines: list[Line]
    """The baseline first, then its control, then the other sides."""
    times: dict[str, list[float]]
    """Seconds of one call, per side and round."""
    rounds: int
    calls: int
    """Timed calls per side and round."""
    facts: dict[str, Any]

    def table(self) -> str:
        """The report as Markdown."""
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        rows = [
            f"## {self.question}",
            "",
            f"| side | ms per call (quartiles) | over {self.baseline} | 95 % interval | ratio of medians |",
            "|---|---:|---:|---:|---:|",
        ]
        for line in self.lines:
            low, high = line.quartiles
            row = f"| {line.name} | {line.milliseconds:.2f} ({low:.2f} to {high:.2f}) | "
            if line.name == self.baseline:
                rows.append(row + "1 | | |")
            else:
                rows.append(
                    row + f"{line.ratio:.3f} | {line.interval[0]:.3f} to {line.interval[1]:.3f} | {line.ratio_of_medians:.3f} |"
                )
        return "\n".join([*rows, "", f"{self.rounds} rounds of {self.calls} calls; {facts}.", ""])

    def write(self, stem: Path) -> None:
        """Write ``stem.json`` and ``stem.md``; only rank 0 does."""
        if not dist.is_initialized() or dist.get_rank() == 0:
            stem.parent.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".json").write_text(json.dumps(asdict(self), indent=1) + "\n")
            stem.with_suffix(".md").write_text(self.table())


def compare(
    question: str,
    sides: Mapping[str, Side],
    baseline: str,
    control: Side | None = None,
    rounds: int = 40,
    calls: int = 3,
    warmup: int = 5,
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    after_round: Callable[[Report], bool] = lambda report: True,
) -> Report:
    """Measure *sides* against the one named *baseline*.

    Args:
        control: a second copy of the baseline, with its own memory; without one the baseline's own callable runs twice.
        calls: timed calls per side and round, after one that is not timed and brings the side's data back into the caches.
        warmup: calls of each side before anything is timed.
        after_round: called with the report so far; False ends the measurement. Under several ranks all have to answer alike.
    """
    again = f"{baseline} (again)"
    runs = {baseline: sides[baseline], again: control or sides[baseline]}
    runs |= {name: side for name, side in sides.items() if name != baseline}
    names = list(runs)

    for _ in range(warmup):
        for name in names:
            runs[name]()
    times: dict[str, list[float]] = {name: [] for name in names}

    def report() -> Report:
        slowest = {name: _slowest(values) for name, values in times.items()}
        lines = [summarize(name, slowest[name], slowest[baseline]) for name in names]
        return Report(question, baseline, lines, slowest, len(slowest[baseline]), calls, machine(torch.device(device)))

    collecting = gc.isenabled()
    try:
        for number in range(rounds):
            gc.collect()
            gc.disable()  # a collection of garbage would be charged to whichever side it falls on
            for name in turn(names, number):
                times[name].append(_time(runs[name], calls, torch.device(device), clock))
            if not after_round(report()):
                break
    finally:
        if collecting:
            gc.enable()
    return report()


def turn(names: Sequence[str], number: int) -> list[str]:
    """The order of round *number*: every second round reverses the one before, and each pair of rounds starts one side later.

    In two rounds per side, each side has been in each place equally often.
    """
    start = number // 2 % len(names)
    order = [*names[start:], *names[:start]]
    return order[::-1] if number % 2 else order


def summarize(name: str, times: Sequence[float], base: Sequence[float], samples: int = 2000) -> Line:
    """Reduce the times of a side and of the baseline, round by round, to a line of the report."""
    ratios = [one / other for one, other in zip(times, base)]
    draw = random.Random(0)
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(samples))
    low, _, high = quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return Line(
        name,
        median(times) * 1e3,
        (low * 1e3, high * 1e3),
        median(ratios),
        (medians[int(0.025 * samples)], medians[int(0.975 * samples) - 1]),
        median(times) / median(base),
    )


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    facts: dict[str, Any] = {
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "threads per rank": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return facts | ({"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _time(side: Side, calls: int, device: torch.device, clock: Callable[[], float]) -> float:
    side()
    _finish(device)
    if dist.is_initialized():
        dist.barrier()
    start = clock()
    for _ in range(calls):
        side()
    _finish(device)
    return (clock() - start) / calls


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(times: list[float]) -> list[float]:
    """Each time's maximum over the ranks."""
    if not dist.is_initialized():
        return times
    tensor = torch.tensor(times, dtype=torch.float64)
    tensor = tensor.cuda() if dist.get_backend() == "nccl" else tensor
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()
