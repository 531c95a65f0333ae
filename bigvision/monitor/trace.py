"""Where the time and the memory of profiled steps went, from a trace in Chrome's format as torch's profiler writes it.

On CUDA the device's time line counts: at each instant the kernels that run. On the CPU the operators of the training thread
count, each with its self time. Times are whole nanoseconds, so that the categories of a step add up to the step.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from bigvision import ranges
from bigvision.ranges import WAIT

MATRIX, ATTENTION, CONVOLUTION, NORM = "matrix products", "attention", "convolution", "normalisation"
ELEMENTWISE, OPTIMIZER = "elementwise", "optimizer"
COMMUNICATION, COPIES, DATA, IDLE = "communication", "copies", "data", "idle"
CATEGORIES = (
    MATRIX, ATTENTION, CONVOLUTION, NORM, ELEMENTWISE, OPTIMIZER, COMMUNICATION, COPIES, DATA, IDLE,
)  # fmt: skip
"""elementwise has reductions and all else that computes, optimizer also the gradient's norm and the average of the weights."""
COMPUTING = frozenset(CATEGORIES[: CATEGORIES.index(COMMUNICATION)])
UPDATING = "between the update's operators"
"""Python within `UPDATE`, on the CPU: it counts as the optimizer's, unless a collective is what it waits for."""
LATER = {COMMUNICATION: COMMUNICATION, COPIES: COPIES, DATA: DATA, UPDATING: OPTIMIZER}
"""What counts where nothing computes, in this order, and as what; else the device is idle."""

UPDATE = frozenset((ranges.REDUCE, ranges.OPTIMIZER, ranges.EMA))
"""Ranges of the training thread that belong to the optimizer."""
STEP = re.compile(r"step (\d+)$")
OPERATION = re.compile(r"(?!autograd::)[a-z_][a-z0-9_]*::")
"""An operator. Nodes of autograd are none: blocks that are recomputed run inside the node that needed them."""
COMPILED = re.compile(r"## Call CompiledFxGraph|Torch-Compiled Region|CompiledFunction")
EXCHANGE = re.compile(r"(c10d|_c10d_functional)::|(gloo|nccl|mpi|ucc):|record_param_comms")
WITHIN = (
    (ATTENTION, re.compile(r"attention|sdpa|flash_attn|fmha", re.I)),
    (CONVOLUTION, re.compile(r"conv", re.I)),
    (NORM, re.compile(r"(layer|batch|group|instance|rms|response)_?norm", re.I)),
)
"""Of an operator: the category of all that runs within it, such as attention's matrix products."""
INNERMOST = (
    (
        MATRIX,
        re.compile(r"::_?(mm|addmm|bmm|baddbmm|addbmm|mv|addmv|dot|matmul|linear|mkldnn_linear|int_mm|addmm_activation)$"),
    ),
    (MATRIX, re.compile(r"::_(scaled|grouped|scaled_grouped)_mm")),
    (
        COPIES,
        re.compile(r"::_?(copy_|to_copy|clone|contiguous|cat|stack|foreach_copy_|chunk_cat|split_with_sizes_copy)$|^fsdp::"),
    ),
)
"""Of an operator: the category of what it runs by itself."""
KERNELS = (
    (COMMUNICATION, re.compile(r"nccl|rccl|multimem_|(one|two)_shot_|symm_?mem", re.I)),
    (ATTENTION, re.compile(r"flash|fmha|attention|attn|sdpa", re.I)),
    (NORM, re.compile(r"(layer|batch|group|instance|rms)_?norm|gammabeta|rowwisemoments|\bbn_(fw|bw)|::bn_", re.I)),
    (CONVOLUTION, re.compile(r"conv|cudnn|wgrad|dgrad|fprop|winograd|implicit_?gemm|nchwtonhwc|nhwctonchw", re.I)),
    (MATRIX, re.compile(r"gemm|gemv|cublas|cutlass|nvjet|matmul|splitk|xmma|dot_kernel", re.I)),
    (COPIES, re.compile(r"copy|catarray|chunk_cat|split_with_sizes", re.I)),
)
"""Of a kernel that no operator of `WITHIN` has launched: cuBLAS's, cuDNN's, CUTLASS's and torch's names."""
TRITON = re.compile(r"triton_(poi|red|per|tem|mm|for)_")
CASTS = re.compile(r"triton_poi_fused(_(_?to_copy|clone|copy_?|cat|stack|view|_?unsafe_view|t|transpose|permute|slice))+_\d+$")
"""An inductor kernel is named after the operators in it; in a pointwise one a matrix product stands for its bias."""


@dataclass(frozen=True, slots=True)
class Event:
    """One that has a duration, on a thread or a stream (its lane)."""

    kind: str
    name: str
    lane: tuple[Any, Any]
    begin: int
    end: int
    correlation: int = -1  # of a kernel and of the call that launched it


@dataclass(frozen=True, slots=True)
class Work:
    """What is done in an interval of time."""

    category: str
    name: str
    begin: int
    end: int


def read_events(trace: dict[str, Any]) -> list[Event]:
    """The events of *trace* that have a duration, by their begin; one that contains another comes first."""
    found = []
    for event in trace["traceEvents"]:
        if event.get("ph") == "X" and "ts" in event:
            begin = round(event["ts"] * 1000)
            end = begin + round(event.get("dur", 0) * 1000)
            lane, correlation = (event.get("pid"), event.get("tid")), event.get("args", {}).get("correlation", -1)
            found.append(Event(event.get("cat", ""), event["name"], lane, begin, end, correlation))
    found.sort(key=lambda event: (event.begin, -event.end))
    return found


def summarise(trace: dict[str, Any]) -> dict[str, Any] | None:
    """Where the time of each step in *trace* went, in milliseconds, the mean over its steps; None where it has no step.

    ``communication`` is the exposed one, beside which nothing computes; ``hidden`` is the rest, which is no part of the sum.
    """
    events = read_events(trace)
    steps = [event for event in events if event.kind == "user_annotation" and STEP.match(event.name)]
    if not steps:
        return None
    windows = [(step.begin, step.end) for step in steps]
    kernels = [event for event in events if event.kind in ("kernel", "gpu_memcpy", "gpu_memset")]
    works = device_works(events, kernels, steps[0].lane) if kernels else host_works(events, steps[0].lane)
    spent, hidden = share_out(windows, works)
    longest: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for work in works:
        inside = sum(max(0, min(work.end, end) - max(work.begin, begin)) for begin, end in windows)
        if inside and work.category != DATA:
            entry = longest[LATER.get(work.category, work.category), work.name]
            entry[0], entry[1] = entry[0] + inside, entry[1] + 1
    each = 1e6 * len(steps)
    top = sorted(longest.items(), key=lambda item: -item[1][0])[:20]
    return {
        "steps": [int(STEP.match(step.name)[1]) for step in steps],  # type: ignore[index]
        "device": "cuda" if kernels else "cpu",
        "step": sum(end - begin for begin, end in windows) / each,
        "categories": {category: spent[category] / each for category in CATEGORIES},
        "hidden": hidden / each,
        "longest": [
            {"name": name[:160], "category": category, "ms": time / each, "calls": calls / len(steps)}
            for (category, name), (time, calls) in top
        ],
    }  # fmt: skip


def device_works(events: Sequence[Event], kernels: Iterable[Event], main: tuple[Any, Any]) -> list[Work]:
    """The kernels and copies of a CUDA device, and what the training thread, on the lane *main*, waited for its data."""
    launches = {e.correlation: e for e in events if e.kind in ("cuda_runtime", "cuda_driver") and e.correlation >= 0}
    marks = Timeline([event for event in events if event.kind == "user_annotation" and event.lane == main])
    on_thread: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.kind == "cpu_op":
            on_thread[event.lane].append(event)
    threads = {lane: Timeline(found) for lane, found in on_thread.items()}
    works = [Work(DATA, WAIT, e.begin, e.end) for e in events if e.name == WAIT and e.lane == main]
    for kernel in kernels:
        launch = launches.get(kernel.correlation)
        chain = threads[launch.lane].at(launch.begin) if launch is not None and launch.lane in threads else ()
        updates = launch is not None and not UPDATE.isdisjoint(marks.at(launch.begin))
        category = COPIES if kernel.kind != "kernel" else kernel_category(kernel.name, chain, updates)
        works.append(Work(category, kernel.name, kernel.begin, kernel.end))
    return works


def host_works(events: Sequence[Event], main: tuple[Any, Any]) -> list[Work]:
    """What the training thread, on the lane *main*, did at each moment, and the collectives that other threads have run."""
    lanes: dict[Any, list[Event]] = {main: []}
    for event in events:
        if event.name.startswith("autograd::"):
            lanes.setdefault(event.lane, [])
    works = []
    for event in events:
        if event.lane in lanes and event.kind in ("cpu_op", "user_annotation"):
            lanes[event.lane].append(event)
        elif EXCHANGE.match(event.name):
            works.append(Work(COMMUNICATION, event.name, event.begin, event.end))
    for found in lanes.values():
        line = Timeline(found)
        for begin, end, chain in line.spans():
            if (category := operator_category(chain)) is not None:
                works.append(Work(category, chain[-1], begin, end))
    # Other threads may go on with what the training thread asks for while it waits for its data: a pipeline's targets.
    waits = Timeline([event for event in events if event.name == WAIT and event.lane == main])
    return [work for work in works if work.category != COMMUNICATION or not waits.at(work.begin)]


class Timeline:
    """What is open on one lane at each moment: names, the outermost first."""

    def __init__(self, events: Iterable[Event]) -> None:
        """*events* are sorted as `read_events` does. One that outlasts what it began in, by rounding, is cut."""
        self.times: list[int] = []
        self.chains: list[tuple[str, ...]] = []
        stack: list[tuple[int, tuple[str, ...]]] = []
        for event in events:
            self._close(stack, event.begin)
            end = min(event.end, stack[-1][0]) if stack else event.end
            chain = (*(stack[-1][1] if stack else ()), event.name)
            stack.append((end, chain))
            self._set(event.begin, chain)
        self._close(stack, None)

    def _close(self, stack: list[tuple[int, tuple[str, ...]]], until: int | None) -> None:
        while stack and (until is None or stack[-1][0] <= until):
            end, _ = stack.pop()
            self._set(end, stack[-1][1] if stack else ())

    def _set(self, time: int, chain: tuple[str, ...]) -> None:
        if self.times and self.times[-1] == time:
            self.chains[-1] = chain
        else:
            self.times.append(time)
            self.chains.append(chain)

    def at(self, time: int) -> tuple[str, ...]:
        place = bisect_right(self.times, time) - 1
        return self.chains[place] if place >= 0 else ()

    def spans(self) -> Iterator[tuple[int, int, tuple[str, ...]]]:
        """(begin, end, what is open) of each time in which something is."""
        for place, chain in enumerate(self.chains):
            if chain:
                yield self.times[place], self.times[place + 1], chain


@cache
def operator_category(chain: tuple[str, ...]) -> str | None:
    """The category of the self time of the last of *chain*, on the CPU; None where Python runs between operators."""
    if any(map(EXCHANGE.match, chain)):
        return COMMUNICATION
    operations = [name for name in chain if OPERATION.match(name) or COMPILED.search(name)]
    if not UPDATE.isdisjoint(chain):
        return OPTIMIZER if operations else UPDATING
    if WAIT in chain:
        return DATA
    if not operations:
        return None
    return _within(operations) or _first(INNERMOST, operations[-1]) or ELEMENTWISE


@cache
def kernel_category(kernel: str, chain: tuple[str, ...], updates: bool) -> str:
    """The category of a *kernel* that operators, in *chain*, launched; *updates*: within the optimizer's step."""
    named = _first(KERNELS, kernel)
    if named == COMMUNICATION:
        return named
    if updates:
        return OPTIMIZER
    operations = [name for name in chain if OPERATION.match(name)]
    if found := _within(operations):
        return found
    if TRITON.match(kernel):
        if kernel.startswith(("triton_tem_", "triton_mm_")):
            return _first(WITHIN, kernel) or (ATTENTION if "flex" in kernel else MATRIX)
        return COPIES if CASTS.match(kernel) else NORM if WITHIN[2][1].search(kernel) else ELEMENTWISE
    return named or (_first(INNERMOST, operations[-1]) if operations else None) or ELEMENTWISE


def _within(operations: Iterable[str]) -> str | None:
    return next((found for name in operations if (found := _first(WITHIN, name))), None)


def _first(table: Iterable[tuple[str, re.Pattern[str]]], name: str) -> str | None:
    return next((category for category, pattern in table if pattern.search(name)), None)


def share_out(windows: Sequence[tuple[int, int]], works: Iterable[Work]) -> tuple[Counter[str], int]:
    """Give each instant of *windows* to one category; returns the time of each, and that of communication that is hidden.

    Several categories that compute at once, on different streams, share the time.
    """
    changes: list[tuple[int, int, str]] = []
    for work in works:
        if work.end > work.begin:
            changes += [(work.begin, 1, work.category), (work.end, -1, work.category)]
    for begin, end in windows:
        changes += [(begin, 1, ""), (end, -1, "")]
    changes.sort()
    spent: Counter[str] = Counter()
    active: Counter[str] = Counter()
    hidden, since = 0, 0
    for time, change, category in changes:
        if (passed := time - since) and active[""]:
            computing = [name for name in CATEGORIES if name in COMPUTING and active[name]]
            shares = computing or [next((LATER[name] for name in LATER if active[name]), IDLE)]
            for place, name in enumerate(shares):
                spent[name] += passed * (place + 1) // len(shares) - passed * place // len(shares)
            hidden += passed if computing and active[COMMUNICATION] else 0
        active[category] += change
        since = time
    return spent, hidden


# Memory.


def memory_peak(trace: dict[str, Any]) -> dict[str, Any] | None:
    """What was allocated when the most was, in bytes; None where *trace* has no allocations.

    ``before`` is what was held already when the recording began, without what was freed of that; None on the CPU, where torch
    knows nothing of it.
    """
    changes = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    kind = max((event["args"]["Device Type"] for event in changes), default=0)  # 1 is CUDA
    changes = sorted((event for event in changes if event["args"]["Device Type"] == kind), key=lambda event: event["ts"])
    if not changes:
        return None
    peak, total, most = 0, 0, 0
    for place, event in enumerate(changes):
        total += event["args"]["Bytes"]
        if total > most:
            peak, most = place, total
    live, freed = _allocated(changes[: peak + 1])
    before = changes[0]["args"]["Total Allocated"] - changes[0]["args"]["Bytes"] - freed if kind else None
    place_of = _places(read_events(trace))
    groups: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for event in live:
        entry = groups[place_of(event)[1:]]
        entry[0], entry[1] = entry[0] + event["args"]["Bytes"], entry[1] + 1
    step, name, _ = place_of(changes[peak])
    return {
        "peak": (before or 0) + sum(size for size, _ in groups.values()),
        "step": step,
        "range": name,
        "before": before,
        "groups": [
            {"range": name, "operation": operation, "bytes": size, "tensors": count}
            for (name, operation), (size, count) in sorted(groups.items(), key=lambda item: -item[1][0])
        ],
    }


def _allocated(changes: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The allocations among *changes* that were not freed, and the bytes that were freed and not allocated among them."""
    live: dict[int, dict[str, Any]] = {}
    freed = 0
    for event in changes:
        size, address = event["args"]["Bytes"], event["args"]["Addr"]
        if size > 0:
            live[address] = event
        elif live.pop(address, None) is None:
            freed -= size
    return list(live.values()), freed


def _places(events: Iterable[Event]) -> Callable[[dict[str, Any]], tuple[int | None, str, str]]:
    """A function that returns where an allocation was made: step, range, and the outermost operator in that."""
    lanes: dict[Any, list[Event]] = defaultdict(list)
    main = None
    for event in events:
        if event.kind in ("cpu_op", "user_annotation"):
            lanes[event.lane].append(event)
            main = event.lane if main is None and STEP.match(event.name) else main
    lines = {lane: Timeline(found) for lane, found in lanes.items()}

    def place_of(event: dict[str, Any]) -> tuple[int | None, str, str]:
        lane, time = (event["pid"], event["tid"]), round(event["ts"] * 1000)
        opened, inner = (lines[one].at(time) if one in lines else () for one in (main, lane))
        step = next((int(match[1]) for name in opened if (match := STEP.match(name))), None)
        marked = [name for name in opened if name in ranges.RANGES]
        named = next((name for name in inner if not STEP.match(name) and name not in ranges.RANGES), "Python")
        named = named.removeprefix("autograd::engine::evaluate_function: ").partition(" (")[0]
        return step, marked[-1] if marked else "", named

    return place_of
