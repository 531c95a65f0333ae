"""Ends a run that does not get on or has lost a rank, and names the rank.

When a limit runs out on any rank, all ranks write their stacks and end at once (`Exit.HUNG`). When a rank has reported an error
of its own or its process is gone, the others get an exception from gloo and end by it; under NCCL they block in the driver, and
those that are still there after half of ``limits.grace`` are ended from here (`Exit.FAULT`).
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bigvision.config import LimitsConfig
from bigvision.errors import Exit, Stopped, UserError, one_line
from bigvision.runtime import guard
from bigvision.runtime.diagnosis import (
    Heartbeats,
    describe,
    details,
    diagnose,
    ended_ranks,
    local_peers,
    missing_ranks,
    store_lost,
    this_process,
)
from bigvision.runtime.identity import Identity
from bigvision.runtime.process import current_identity, nccl_trace
from bigvision.runtime.rendezvous import RankFailure

Phase = Literal["start", "step", "evaluate", "save"]

LONGEST_PULSE, SHORTEST_PULSE = 1.0, 0.05
PULSES = 30
"""In the shortest limit."""
PULSES_OF_GRACE = 10
"""In limits.grace."""
NAP = 2.0
"""Seconds without a turn for the watching thread from which on the process counts as stopped, not as slow."""
WRITING = 5.0
"""Seconds that a disk and a terminal get for the stacks, and the driver for its trace."""

_BROKEN = re.compile("another rank is gone")
_LOST = re.compile("connection|closed by peer|broken pipe|timed ?out|timeout|NCCL|another rank is gone", re.I)
"""In the messages of gloo, NCCL and the store when another rank is gone."""

NCCL_DEFAULTS: dict[str, tuple[tuple[str, ...], Callable[[LimitsConfig], str]]] = {
    # torch ends a process whose NCCL watchdog thread has made no progress for 480 s, which is less than limits.step.
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": ((), lambda limits: f"{collective_timeout(limits).total_seconds():.0f}"),
    # After an asynchronous error torch ends the process, but 4 times this later: never before limits.grace has run out.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": ((), lambda limits: f"{max(15_000, 500 * (limits.grace or 0)):.0f}"),
    # It ends without cleaning up: ncclCommAbort may hang. torchrun sets 1, which cleans up first; that is as late.
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (("NCCL_ASYNC_ERROR_HANDLING",), lambda limits: "3"),
    # The flight recorder's last collectives, which are written beside the stacks when a limit runs out.
    "TORCH_FR_BUFFER_SIZE": (("TORCH_NCCL_TRACE_BUFFER_SIZE",), lambda limits: "2000"),
    "TORCH_NCCL_DUMP_ON_TIMEOUT": ((), lambda limits: "1"),
}
"""What torch's own watchdog reads when an NCCL group is made: each variable, its older names and our value, which makes torch
speak after this watchdog. Variables that are set already stay as they are."""


class At(NamedTuple):
    """Where this rank is, and since when."""

    phase: Phase
    step: int
    count: int
    """How many reports there were before: the same for all ranks that are as far."""
    data: bool
    """It waits for its data."""
    since: float


class Fault(NamedTuple):
    """What has ended the run, as this rank learned of it."""

    text: str
    since: float


class Watchdog:
    """Watches this rank from its start on; a context manager, on every rank.

    A thread that waits for nobody ends the process with `Exit.HUNG` when a limit runs out here or on another rank, after
    it has written the stacks of all threads to standard error and to *stacks*, and with `Exit.FAULT` when another rank has
    failed and this one still waits for it. Ranks hear of each other by `Heartbeats`.
    """

    def __init__(self, limits: LimitsConfig, stacks: Path | None = None) -> None:
        """Args:
        limits: seconds for each phase; None is for ever.
        stacks: folder that gets a file for each rank.
        """
        self.limits = dataclasses.asdict(limits)
        self.grace = limits.grace
        self.folder = stacks
        self.pulse = _pulse(limits)
        self.at = At("start", 0, 0, False, time.monotonic())
        self.left = False
        """Whether this rank needs the others no more, and they need not wait for it."""
        self._nccl = {name: value(limits) for name, (_, value) in NCCL_DEFAULTS.items()}
        self._failed = ""
        """The traceback of this rank's own error, which it has reported."""
        self._fault: Fault | None = None
        self._naps = (0.0, 0.0)
        self._asking = False
        self._guard: guard.Guard | None = None
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        self.identity: Identity = current_identity()
        self._variables = _set_unless_given(self._nccl)
        self._self = this_process() | {"rank": self.identity.rank}
        self._main = threading.get_ident()
        self.beats = Heartbeats(self.identity, self.pulse, self._say) if self.identity.world_size > 1 else None
        if self.beats is not None and self.grace is not None and guard.needed():
            self._guard = guard.Guard(self.identity.rank, self.pulse, self.grace / 2)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        alike = isinstance(error, (UserError, Stopped, RankFailure))  # on all ranks
        if isinstance(error, Exception) and not alike and not _came_of_loss(error) and self.beats is not None and not self.left:
            self._report_own(self.beats, error)
        self._done.set()
        self.left = True
        if self.beats is not None:
            self.beats.news.set()
            self.beats.close()
        self._thread.join()
        if self._guard is not None:
            self._guard.close()
        faulthandler.cancel_dump_traceback_later()
        for name in self._variables:
            os.environ.pop(name, None)

    # Reports of the training loop. Nothing here waits.

    def beat(self, phase: Phase, step: int) -> None:
        """Report that this rank begins *phase* of *step*, or its next batch: the limit counts from here."""
        self.at = At(phase, step, self.at.count + 1, phase != "save", time.monotonic())

    def waits_for_data(self, waits: bool) -> None:
        """Report that this rank begins, or has ended, to wait for (more of) the data of its step; the limit counts on."""
        at = self.at
        self.at = At(at.phase, at.step, at.count + 1, waits, at.since)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Make an error that came of another rank's end name that rank, and report this rank's own errors to the others.

        What needs the other ranks is in here: when it ends without an error, this rank has left.

        Raises:
            RankFailure: in the place of such an error.
        """
        try:
            yield
        except (UserError, Stopped):
            self._leave()
            raise  # the same on every rank
        except BaseException as error:
            beats = self.beats
            if beats is None:
                raise
            who = self._who(beats) if _came_of_loss(error) else None
            if who is None:
                if isinstance(error, RankFailure):
                    self._leave()
                    raise  # the same on every rank
                self._report_own(beats, error)
            else:
                self._failed = traceback.format_exc()
            self.left = True
            beats.hurry(self.pulse)
            if beats.holds_store:
                time.sleep(3 * self.pulse)  # for the others to read it
            if who is None:
                raise
            raise RankFailure(f"{who}; here: {one_line(error)[:200]}") from error
        self._leave()

    def _leave(self) -> None:
        """Publish that this rank needs the others no more. Nobody waits here."""
        self.left = True
        if self.beats is not None:
            self.beats.wake()

    # Errors.

    def _report_own(self, beats: Heartbeats, error: BaseException) -> None:
        """Report an error of this rank's own to the others."""
        self._failed = "".join(traceback.format_exception(error))
        beats.report(f"rank {self.identity.rank} failed: {type(error).__name__}: {one_line(error)}", False, 1.0)

    def _who(self, beats: Heartbeats) -> str | None:
        """Return whose end broke a collective, in words; None where nothing is known."""
        deadline = time.monotonic() + beats.patience + 2 * self.pulse
        self._asking = beats.curious = True
        beats.hurry(self.pulse)
        while time.monotonic() < deadline:
            if beats.fault is not None and beats.fault["end"]:
                time.sleep(deadline + WRITING - time.monotonic())  # this process is about to be ended, with better words
            if beats.fault is not None:
                return beats.fault["text"]
            if who := missing_ranks(beats, self._mine()) or store_lost(beats, self._mine()):
                return beats.report(who, False, self.pulse)["text"]
            beats.hurry(self.pulse)
        return None

    # The watching thread.

    def _watch(self) -> None:
        turn = time.monotonic()
        while not self._done.is_set():
            news = self.beats.news if self.beats is not None else self._done
            news.wait(self.pulse)
            if news is not self._done:
                news.clear()
            now = time.monotonic()
            if now - turn > max(NAP, 2 * self.pulse):
                # A job that was suspended as a whole goes on where it was: the time does not count.
                since = self.at.since
                self._naps = since, now - turn + (self._naps[1] if self._naps[0] == since else 0.0)
            turn = now
            self._look(now)

    def _look(self, now: float) -> None:
        at = self.at
        limit = self.limits[at.phase]
        waited = now - at.since - (self._naps[1] if self._naps[0] == at.since else 0.0)
        beats = self.beats
        if beats is not None:
            complete = len(beats.heard) == self.identity.world_size - 1
            beats.curious = not complete or self._asking or (limit is not None and waited > limit / 2)
            if beats.fault is not None and beats.fault["end"] and not self._done.is_set():
                self._end(beats.fault["text"], Exit.HUNG)
            if self.grace is not None:
                self._end_after_fault(beats, self.grace)
            if self._guard is not None:
                fault = self._fault.text if self._fault is not None else ""
                self._guard.report(fault, local_peers(beats, self._self), self.left)
        if limit is None:
            faulthandler.cancel_dump_traceback_later()
            return
        if waited > limit and not self._done.is_set():
            self._end(self._verdict(at, limit), Exit.HUNG)
        # Native code that never lets go of the interpreter stops this thread too; then this ends the process, with code 1.
        faulthandler.dump_traceback_later(max(2 * limit - waited, self.pulse), exit=True, file=2)

    def _end_after_fault(self, beats: Heartbeats, grace: float) -> None:
        """End this process where another rank has failed or is gone and no exception has ended this one.

        News may take half of the grace period to come here: to find a process gone, to ask for its last report, and to hear of
        what only other hosts can see. The other half is for gloo's exceptions, which give a better end. A rank with an error
        of its own has the whole period: it waits for the ends of the others while it cleans up.
        """
        if self._done.is_set() or (self.left and not self._failed):
            return
        if self._fault is None:
            text = beats.fault["text"] if beats.fault is not None else self._ended(beats, grace)
            if text:
                self._fault = Fault(text, time.monotonic())
            return
        allowed = grace if self._failed else grace / 2
        if time.monotonic() - self._fault.since > allowed:
            state = "it had not cleaned up" if self._failed else "it still waited"
            self._end(f"{self._fault.text}; {state} {allowed:g} s later (limits.grace: {grace:g} s)", Exit.FAULT)

    def _ended(self, beats: Heartbeats, grace: float) -> str:
        """Return which ranks' processes have ended without leaving the run, in words, after telling the others."""
        if not ended_ranks(beats, self._self):
            return ""
        # The last report of such a rank has not been read: it may have left in order.
        beats.curious = True
        beats.hurry(min(beats.patience, grace / 4))
        if not (found := ended_ranks(beats, self._self)):
            return ""
        return beats.report("; ".join(found.values()), False, min(2 * self.pulse, grace / 8))["text"]

    def _verdict(self, at: At, limit: float) -> str:
        if self.beats is not None:
            self.beats.hurry(self.beats.patience)  # the last word of each, or the certainty that the store is silent
            if self.beats.fault is not None and self.beats.fault["end"]:
                return self.beats.fault["text"]
        mine = self._mine()
        what = f"limits.{at.phase}: {limit:g} s ran out on rank {mine['rank']}"
        if self.beats is None:
            return f"{what} in {describe(mine)}"
        first = f" after {self.beats.fault['text']}" if self.beats.fault is not None else ""
        text = f"{what}{first}: {diagnose(self.beats, mine)}"
        said = self.beats.report(text, True, min(2 * self.pulse, limit / 4))
        return said["text"] if said["end"] else text

    def _end(self, text: str, code: Exit) -> None:
        """End this process with *text*, and with the stacks where a limit ran out."""
        rank, hung = self.identity.rank, code == Exit.HUNG
        path = self.folder / f"rank-{rank}.txt" if hung and self.folder is not None else None
        line = f"error: rank {rank}: {text}{f'; stacks: {path}' if path is not None else ''}\n"
        stacks = f"rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {text}\n\n{all_stacks()}\n" if hung else self._failed
        writers = [_aside(lambda: _write(2, f"\n{stacks}{line}"))]
        if path is not None:
            writers.append(_aside(lambda: _write_file(path, stacks)))
        _join(writers)
        if path is not None:
            # The driver may not answer while it holds the interpreter: then this ends the process, with code 1.
            faulthandler.dump_traceback_later(WRITING, exit=True, file=2)
            _join([_aside(lambda: _write_trace(path.with_name(f"nccl-{rank}.json")))])
        if hung and self.beats is not None and self.beats.holds_store:
            time.sleep(4 * self.pulse)  # the others have yet to read why
        os._exit(code)

    def _say(self, curious: bool) -> dict[str, Any]:
        at = self.at
        place = {"phase": at.phase, "step": at.step, "count": at.count, "data": at.data, "left": self.left}
        return self._self | place | (details(self._main) if curious else {})

    def _mine(self) -> dict[str, Any]:
        return self._say(curious=True)


def collective_timeout(limits: LimitsConfig) -> timedelta:
    """How long a collective may take: longer than any limit, which names the missing rank where a timeout cannot."""
    return timedelta(seconds=max([1800.0, *(2 * limit + 60 for limit in _phase_limits(limits))]))


def _came_of_loss(error: BaseException | None) -> bool:
    """Whether *error* reads as if another rank had gone."""
    pattern = _BROKEN if isinstance(error, RankFailure) else _LOST
    return isinstance(error, RuntimeError) and bool(pattern.search(str(error)))


def all_stacks() -> str:
    """Where each thread of this process is, the innermost call last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = []
    for ident, frame in sys._current_frames().items():
        # Without the lines of the sources: reading them may wait for a disk.
        frames = traceback.StackSummary.extract(reversed(list(traceback.walk_stack(frame))), lookup_lines=False)
        calls = [f'  File "{call.filename}", line {call.lineno}, in {call.name}' for call in frames]
        parts.append("\n".join([f"thread {names.get(ident, ident)}:", *calls]))
    return "\n\n".join(parts)


def _phase_limits(limits: LimitsConfig) -> list[float]:
    return [limit for limit in (limits.start, limits.step, limits.evaluate, limits.save) if limit is not None]


def _pulse(limits: LimitsConfig) -> float:
    shortest = min([LONGEST_PULSE, *(limit / PULSES for limit in _phase_limits(limits))])
    return max(SHORTEST_PULSE, min(shortest, (limits.grace or PULSES) / PULSES_OF_GRACE))


def _set_unless_given(defaults: dict[str, str]) -> list[str]:
    """Set the variables of `NCCL_DEFAULTS` that are not set under any name; return which."""
    names = {name: (name, *NCCL_DEFAULTS[name][0]) for name in defaults}
    added = [name for name in defaults if not any(other in os.environ for other in names[name])]
    os.environ.update({name: defaults[name] for name in added})
    return added


def _aside(work: Callable[[], None]) -> threading.Thread:
    def quietly() -> None:
        with suppress(OSError):
            work()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    return thread


def _write(file: int, text: str) -> None:
    data = text.encode(errors="replace")
    while data:
        data = data[os.write(file, data) :]


def _write_file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _write_trace(path: Path) -> None:
    if trace := nccl_trace():
        path.write_bytes(trace)


def _join(threads: list[threading.Thread]) -> None:
    deadline = time.monotonic() + WRITING
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
