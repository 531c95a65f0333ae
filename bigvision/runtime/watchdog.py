"""Ends a run that does not get on, and says which rank held it up."""

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
from bigvision.runtime.collectives import RankFailure
from bigvision.runtime.environment import Identity
from bigvision.runtime.heartbeats import Heartbeats
from bigvision.runtime.identity import identify
from bigvision.runtime.suspects import absentees, accuse, describe, details, store_lost, whereabouts

Phase = Literal["start", "step", "evaluate", "save"]

LONGEST_PULSE, SHORTEST_PULSE = 1.0, 0.05
PULSES = 30
"""In the shortest limit."""
NAP = 2.0
"""Seconds without a turn for the watching thread from which on the process counts as stopped, not as slow."""
WRITING = 5.0
"""Seconds that a disk and a terminal get for the stacks."""

_BROKEN = re.compile("another rank is gone")
_LOST = re.compile("connection|closed by peer|broken pipe|timed ?out|timeout|NCCL|another rank is gone", re.I)
"""What gloo, NCCL and the store say when another rank is gone."""


class At(NamedTuple):
    """Where this rank is, and since when."""

    phase: Phase
    step: int
    count: int
    """How often it said so: the same for all ranks that are as far."""
    data: bool
    """It waits for its data."""
    since: float


class Watchdog:
    """Watches this rank from its start on; a context manager, on every rank.

    A thread that waits for nobody ends the process with `Exit.HUNG` when a limit runs out here or on another rank, after
    it has written the stacks of all threads to standard error and to *stacks*. Ranks hear of each other by `Heartbeats`.
    """

    def __init__(self, limits: LimitsConfig, stacks: Path | None = None) -> None:
        """Args:
        limits: seconds for each phase; None is for ever.
        stacks: folder that gets a file for each rank.
        """
        self.limits = dataclasses.asdict(limits)
        self.folder = stacks
        self.pulse = _pulse(limits)
        self.at = At("start", 0, 0, False, time.monotonic())
        self.left = False
        self._naps = (0.0, 0.0)
        self._asking = False
        self._done = threading.Event()

    def __enter__(self) -> Watchdog:
        self.identity: Identity = identify(os.environ)
        self._self = whereabouts() | {"rank": self.identity.rank}
        self._main = threading.get_ident()
        self.beats = Heartbeats(self.identity, self.pulse, self._say) if self.identity.world_size > 1 else None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self.left = True
        if self.beats is not None:
            self.beats.news.set()
            self.beats.close()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    # What the training loop says. Nothing here waits.

    def beat(self, phase: Phase, step: int) -> None:
        """Say that this rank begins *phase* of *step*, or its next batch: the limit counts from here."""
        self.at = At(phase, step, self.at.count + 1, phase != "save", time.monotonic())

    def fed(self) -> None:
        """Say that this rank has the data for what it has begun; the limit counts on."""
        at = self.at
        self.at = At(at.phase, at.step, at.count + 1, False, at.since)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Let an error that came of another rank's end name that rank, and let the others know of this rank's own.

        Raises:
            RankFailure: in the place of such an error.
        """
        try:
            yield
        except (UserError, Stopped):
            raise  # the same on every rank
        except Exception as error:
            if self.beats is None:
                raise
            lost = isinstance(error, RuntimeError) and (_BROKEN if isinstance(error, RankFailure) else _LOST).search(str(error))
            who = self._who(self.beats) if lost else None
            if who is None:
                if isinstance(error, RankFailure):
                    raise  # the same on every rank
                self.beats.report(f"rank {self.identity.rank} failed: {type(error).__name__}: {one_line(error)}", False, 1.0)
            self._leave(self.beats)
            if who is None:
                raise
            raise RankFailure(f"{who}; here: {one_line(error)[:200]}") from error

    # Errors.

    def _who(self, beats: Heartbeats) -> str | None:
        """Whose end broke a collective; None where nothing is known."""
        deadline = time.monotonic() + beats.patience + 2 * self.pulse
        self._asking = beats.curious = True
        beats.hurry(self.pulse)
        while time.monotonic() < deadline:
            if beats.fault is not None and beats.fault["end"]:
                time.sleep(deadline + WRITING - time.monotonic())  # this process is about to be ended, with better words
            if beats.fault is not None:
                return None if beats.fault["rank"] == self.identity.rank else beats.fault["text"]
            if who := absentees(beats, self._mine()) or store_lost(beats, self._mine()):
                return beats.report(who, False, self.pulse)["text"]
            beats.hurry(self.pulse)
        return None

    def _leave(self, beats: Heartbeats) -> None:
        self.left = True
        beats.hurry(self.pulse)
        if beats.holds_store:
            time.sleep(3 * self.pulse)  # for the others to read it

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
                self._end(beats.fault["text"])
        if limit is None:
            faulthandler.cancel_dump_traceback_later()
            return
        if waited > limit and not self._done.is_set():
            self._end(self._verdict(at, limit))
        # Native code that never lets go of the interpreter stops this thread too; then this ends the process, with code 1.
        faulthandler.dump_traceback_later(max(2 * limit - waited, self.pulse), exit=True, file=2)

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
        text = f"{what}{first}: {accuse(self.beats, mine)}"
        said = self.beats.report(text, True, min(2 * self.pulse, limit / 4))
        return said["text"] if said["end"] else text

    def _end(self, text: str) -> None:
        """Write the stacks and *text*, and end this process."""
        rank = self.identity.rank
        path = self.folder / f"rank-{rank}.txt" if self.folder is not None else None
        line = f"error: rank {rank}: {text}{f'; stacks: {path}' if path is not None else ''}\n"
        stacks = f"rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {text}\n\n{all_stacks()}\n"
        writers = [_aside(lambda: _write(2, f"\n{stacks}{line}"))]
        if path is not None:
            writers.append(_aside(lambda: _write_file(path, stacks)))
        deadline = time.monotonic() + WRITING
        for writer in writers:
            writer.join(max(0.0, deadline - time.monotonic()))
        if self.beats is not None and self.beats.holds_store:
            time.sleep(4 * self.pulse)  # the others have yet to read why
        os._exit(Exit.HUNG)

    def _say(self, curious: bool) -> dict[str, Any]:
        at = self.at
        place = {"phase": at.phase, "step": at.step, "count": at.count, "data": at.data, "left": self.left}
        return self._self | place | (details(self._main) if curious else {})

    def _mine(self) -> dict[str, Any]:
        return self._say(curious=True)


def collective_timeout(limits: LimitsConfig) -> timedelta:
    """How long a collective may take: longer than any limit, which names who is missed where a timeout cannot."""
    given = [limit for limit in dataclasses.astuple(limits) if limit is not None]
    return timedelta(seconds=max([1800.0, *(2 * limit + 60 for limit in given)]))


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


def _pulse(limits: LimitsConfig) -> float:
    given = [limit for limit in dataclasses.astuple(limits) if limit is not None]
    return min(LONGEST_PULSE, max(SHORTEST_PULSE, min(given, default=PULSES) / PULSES))


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
