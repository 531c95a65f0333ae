"""The curves and events of a run, from metrics.jsonl: read on from where the last reading ended, few points of each curve.

A long curve keeps, of each bucket of 2^n steps, the lines with the least and the greatest value. Buckets of one width lie
within those of the next, so that it does not matter how often points were dropped before: the extremes of a bucket are always
those of the file, and each point that is kept is a value of the file at its own step.
"""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

CHUNK = 1 << 20
"""Bytes that are read at a time."""
RAW = 8192
"""Points of a curve before some are dropped."""
SERIES = 64
"""Curves of a run: callbacks and trackers may add fields of their own."""
EVENTS = 400
"""Events of a kind that are kept: beyond it every second one is dropped."""


class Series:
    """One curve."""

    def __init__(self) -> None:
        self.x: list[int] = []
        self.y: list[float] = []
        self.dropped = 0

    @property
    def count(self) -> int:
        """Points in the file."""
        return self.dropped + len(self.x)

    def shorten(self) -> None:
        """Drop points where there are many."""
        if (before := len(self.x)) > RAW:
            self.x, self.y = self.points(RAW // 4)
            self.dropped += before - len(self.x)

    def points(self, most: int) -> tuple[list[int], list[float]]:
        """At most *most* points, in the order of the steps; the first and the last are among them."""
        if len(self.x) <= most:
            return self.x, self.y
        x, y = np.array(self.x), np.array(self.y)
        order = np.argsort(x, kind="stable")
        x, y = x[order], y[order]
        buckets, width = x, 1
        while np.count_nonzero(np.diff(buckets)) + 1 > max(1, most // 2 - 1):
            width *= 2
            buckets = x // width
        by_value = np.lexsort((y, buckets))
        firsts = np.flatnonzero(np.r_[True, np.diff(buckets[by_value]) > 0])
        least, greatest = by_value[firsts], by_value[np.r_[firsts[1:], len(x)] - 1]
        kept = np.unique(np.concatenate([least, greatest, [0, len(x) - 1]]))
        return x[kept].tolist(), y[kept].tolist()


class Kind:
    """The events of one kind."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.count, self.every = 0, 1

    def add(self, event: dict[str, Any]) -> None:
        if self.count % self.every == 0:
            self.kept.append(event)
        self.count += 1
        if len(self.kept) > EVENTS:
            self.kept, self.every = self.kept[::2], self.every * 2


class Curves:
    """What metrics.jsonl has, as far as it was read."""

    def __init__(self, path: Path, pause: float = 0.0) -> None:
        """Args: *pause* is the share of the time of reading that is waited after each chunk, while a run goes on."""
        self.path, self.pause = path, pause
        self.file: IO[bytes] | None = None
        self._forget()

    def _forget(self) -> None:
        self.offset, self.rest = 0, b""
        self.series: dict[str, Series] = {}
        self.kinds: dict[str, Kind] = {}
        self.step, self.lines = 0, 0
        self.slow: frozenset[str] = frozenset()

    def update(self) -> None:
        """Read what was added since the last time. An `OSError` where the file cannot be read; none where it is missing."""
        if self.file is not None and not self._same():
            self.close()
            self._forget()
        if self.file is None:
            try:
                self.file = self.path.open("rb")
            except FileNotFoundError:
                return
        self.file.seek(self.offset)
        while True:
            began = time.perf_counter()
            chunk = self.file.read(CHUNK)
            if not chunk:
                return
            self.offset += len(chunk)
            *lines, self.rest = (self.rest + chunk).split(b"\n")
            for line in _parsed([line for line in lines if line]):
                self._take(line)
            if self.pause:
                time.sleep(self.pause * (time.perf_counter() - began))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _same(self) -> bool:
        """Whether the file is the one that was read: a restart and a rollback put a shorter one in its place."""
        assert self.file is not None
        opened = os.fstat(self.file.fileno())
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return False
        return (opened.st_dev, opened.st_ino) == (now.st_dev, now.st_ino) and now.st_size >= self.offset

    def _take(self, line: Any) -> None:
        if not isinstance(line, dict) or type(step := line.get("step")) is not int:
            return
        self.lines += 1
        if self.lines % RAW == 0:
            for series in self.series.values():
                series.shorten()
        self.step = max(self.step, step)
        event = evaluation = False
        for name, value in line.items():
            kind = type(value)
            if kind is float or kind is int:
                series = self.series.get(name) or self._new_series(name)
                if series is not None and -math.inf < value < math.inf:
                    series.x.append(step)
                    series.y.append(value)
                evaluation = evaluation or name[:4] == "val_"
            elif value is not None and name != "stragglers":
                event = True
        if evaluation:
            self.event("evaluation", step, _numbers(line))
        if self.slow or "stragglers" in line:
            self._slow_ranks(step, line)
        if event:
            self._event(step, line)

    def _new_series(self, name: str) -> Series | None:
        if name in ("step", "samples") or len(self.series) >= SERIES:
            return None
        self.series[name] = Series()
        return self.series[name]

    def _slow_ranks(self, step: int, line: dict[str, Any]) -> None:
        """An event where other ranks are slow than in the training line before."""
        found = line.get("stragglers")
        if found is None and "loss" not in line:
            return
        ranks = frozenset(found) if isinstance(found, dict) else frozenset()
        if ranks - self.slow and isinstance(found, dict):
            text = ", ".join(f"rank {rank}: {seconds} s in each step" for rank, seconds in list(found.items())[:20])
            self.event("slow rank", step, text)
        self.slow = ranks

    def _event(self, step: int, line: dict[str, Any]) -> None:
        if (found := line.get("not_finite")) is not None:
            ranks = found.items() if isinstance(found, dict) else ()
            where = "; ".join(f"rank {rank}, samples {', '.join(map(str, ids[:20]))}" for rank, ids in ranks if ids)
            self.event("skipped", step, f"the loss is not finite: {where}" if where else "the gradient is not finite")
        elif isinstance(spike := line.get("spike"), dict):
            self.event("spike", step, _numbers(spike))
        elif isinstance(back := line.get("rolled_back"), dict):
            self.event("rolled back", step, _numbers(back))
        elif line.get("skipped") is True:
            before = self.kinds["skipped"].kept if "skipped" in self.kinds else []
            if not before or before[-1]["step"] != step:  # else its reason is known
                self.event("skipped", step, "no update: an overflow of fp16, or a batch that made a spike before")
        else:
            facts = {name: value for name, value in line.items() if name not in ("step", "samples")}
            self.event("event", step, json.dumps(facts)[:400])

    def event(self, kind: str, step: int, text: str, **more: Any) -> None:
        """Add an event."""
        self.kinds.setdefault(kind, Kind()).add({"kind": kind, "step": step, "text": text} | more)


def _parsed(lines: list[bytes]) -> list[Any]:
    """The lines as JSON: all at once, which takes half the time, or one by one where some are damaged."""
    try:
        return json.loads(b"[" + b",".join(lines) + b"]")
    except (ValueError, RecursionError):
        found = []
        for line in lines:
            with suppress(ValueError, RecursionError):
                found.append(json.loads(line))
        return found


def _numbers(line: dict[str, Any]) -> str:
    found = {name.removeprefix("val_"): value for name, value in line.items() if type(value) in (float, int)}
    return ", ".join(f"{name} {value:.5g}" for name, value in found.items() if name not in ("step", "samples"))
