"""Ends a run that hangs or has lost a rank, and names the rank.

`STATES` is the state machine of a rank, as a table that the code reads. `Board` holds all that changes, behind one lock, for

- the main thread, which reports where it is (`Watchdog.beat`) and how its work ended (`Watchdog.naming`); nothing blocks it but
  an error, for which it asks the others;
- the clock thread, which compares that with the limits each pulse, ends the process, and never touches the network;
- the store thread, which exchanges reports with the other ranks through the store by which they found each other.

Clock and store cannot be one thread: TCPStore has no timeout for an answer (torch 2.11), so that a store whose process is
stopped blocks its clients for ever, and that is when the limits must run out. A rank of a single-rank run has no store thread.

Native code that holds the interpreter stops all threads: then faulthandler ends the process after twice the limit (it needs no
interpreter), and `guard.py`, a program of its own, after a fault. At the end short-lived threads write the stacks, since a disk
or a terminal may block.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from bigvision.config import LimitsConfig
from bigvision.errors import Exit, Stopped, UserError, one_line
from bigvision.runtime import diagnosis, guard
from bigvision.runtime.diagnosis import Heard, News, Report
from bigvision.runtime.process import RankFailure, current_identity, nccl_trace
from bigvision.runtime.rendezvous import Identity, environment, launcher_holds_store

Phase = Literal["start", "step", "evaluate", "save"]
Event = Literal["fault", "error", "leave", "close"]


class Limit(NamedTuple):
    """A time after which this process is ended."""

    key: Literal["phase", "grace"]
    """The limit of the phase, from the last beat on; or `limits.grace`, from the first fault on any rank on."""
    share: float
    """Of that limit."""
    code: Exit
    """HUNG: all ranks end, and write their stacks. FAULT: this rank ends, for the fault."""
    words: str = ""


class State(NamedTuple):
    """What ends a rank, and the state that follows each event. A beat changes no state: the limit of its phase counts anew."""

    needs_others: bool
    limits: tuple[Limit, ...]
    """Looked at in this order. A limit that ran out on another rank (`Fault.ends_all`) ends this one first."""
    fault: str
    """Another rank has reported an error or is gone."""
    error: str
    """An error has ended the work here: this rank's own, or what came of another rank's end."""
    leave: str
    """What needs the others is done."""
    close: str = "closed"


PHASE = Limit("phase", 1.0, Exit.HUNG)
# News may take half of limits.grace to come here: to find a process gone, to ask for its last report, and to hear of what only
# other hosts can see. The other half is for gloo's exceptions, which give a better end.
BLOCKED = Limit("grace", 0.5, Exit.FAULT, "it still waited")
UNFINISHED = Limit("grace", 1.0, Exit.FAULT, "it had not cleaned up")
STATES = {
    #          needs others  limits              on a fault  on an error  on leaving     waits for
    "running": State(True,  (PHASE,),            "lost",     "failed",    "left"),     # nobody, or the others in a collective
    "lost":    State(True,  (BLOCKED, PHASE),    "lost",     "failed",    "left"),     # an exception; NCCL raises none
    "failed":  State(False, (UNFINISHED, PHASE), "failed",   "failed",    "failed"),   # its own clean-up, which may block
    "left":    State(False, (PHASE,),            "left",     "left",      "left"),     # nobody
    "closed":  State(False, (),                  "closed",   "closed",    "closed"),   # nobody: the watchdog has ended
}  # fmt: skip

LONGEST_PULSE, SHORTEST_PULSE = 1.0, 0.05
"""Seconds between two looks of the clock, and two rounds of the store thread; with `PULSES` in the shortest limit."""
PULSES, PULSES_OF_GRACE = 30, 10
SILENT = 5.0
"""Pulses without news after which a rank is silent, and no less than a second: a busy host may be late."""
NAP = 2.0
"""Seconds without a turn for the clock from which on the process counts as stopped, not as slow."""
WRITING = 5.0
"""Seconds that a disk and a terminal get for the stacks, and the driver for its trace."""
CONNECT = timedelta(seconds=5)
_starts: Counter[tuple[object, ...]] = Counter()
"""How often this process has been a rank of a run."""

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
act after this watchdog. Variables that are set already stay as they are."""


class At(NamedTuple):
    """Where this rank is, and since when."""

    phase: Phase = "start"
    step: int = 0
    count: int = 0
    """How many reports there were before: the same for all ranks that are as far."""
    data: bool = False
    """It waits for its data."""


class Fault(NamedTuple):
    """What has ended the run: the first fault on any rank, as far as this rank knows."""

    text: str
    ends_all: bool
    """A limit ran out: all ranks end at once."""
    since: float


@dataclass
class Board:
    """All that changes while the watchdog runs.

    Every field is read and written while `changed` is held. Nobody who holds it waits for the network, a disk or a process.
    """

    news: News
    changed: threading.Condition = field(default_factory=threading.Condition)
    state: str = "running"
    at: At = field(default_factory=At)
    since: float = field(default_factory=time.monotonic)
    """When the phase, or its next batch, began."""
    suspended: float = 0.0
    """Seconds since then during which the whole process was stopped. They do not count."""
    fault: Fault | None = None
    to_report: Fault | None = None
    """A fault that the store has not taken yet."""
    traceback: str = ""
    """Of the error of a rank that has failed."""
    asking: bool = False
    """Whether the other ranks' reports are read in every round; in quiet times nobody reads them."""
    rounds: int = 0
    """Exchanges with the store that have ended, well or not."""
    wanted: int = 0
    """The round up to which the store thread does not pause."""

    def enter(self, event: Event) -> bool:
        """Go to the state that follows *event*, and have it published; returns whether it is another one. Nobody waits here."""
        with self.changed:
            before, self.state = self.state, getattr(STATES[self.state], event)
            if self.state != before:
                self._want_rounds()
            return self.state != before

    def copy(self) -> Board:
        """A copy that no thread changes."""
        with self.changed:
            return replace(self, news=replace(self.news, heard=dict(self.news.heard)))

    def waited(self) -> float:
        """Seconds since the last beat that count."""
        return time.monotonic() - self.since - self.suspended

    def await_rounds(self, patience: float, asking: bool = False) -> None:
        """Have a whole exchange with the store, *asking* from now on, and wait for its end, for *patience* seconds at most."""
        with self.changed:
            self.asking = self.asking or asking
            goal = self._want_rounds()
            self.changed.wait_for(lambda: self.rounds >= goal or self.state == "closed", patience)

    def _want_rounds(self) -> int:
        # The one under way may have passed what it is wanted for.
        self.wanted = self.rounds + 2
        self.changed.notify_all()
        return self.wanted


class Watchdog:
    """Watches this rank from its start on; a context manager, on every rank."""

    def __init__(self, limits: LimitsConfig, stacks: Path | None = None) -> None:
        """*stacks* is a folder that gets a file for each rank."""
        self._config = limits
        self.limits: dict[str, float | None] = asdict(limits)
        self.folder = stacks
        shortest = min([LONGEST_PULSE, *(limit / PULSES for limit in _phase_limits(limits))])
        self.pulse = max(SHORTEST_PULSE, min(shortest, (limits.grace or PULSES) / PULSES_OF_GRACE))
        self._guard: guard.Guard | None = None

    def __enter__(self) -> Watchdog:
        self.identity: Identity = current_identity()
        unset = {name: value for name, (older, value) in NCCL_DEFAULTS.items() if not {name, *older} & os.environ.keys()}
        self._variables = environment({name: value(self._config) for name, value in unset.items()})
        self._variables.__enter__()
        self._main = threading.get_ident()
        self.board = Board(News(self.identity, diagnosis.this_process(), max(1.0, SILENT * self.pulse)))
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if self.identity.world_size > 1:
            # A store may outlive a restart of the ranks, and a process may train several times in a row.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            place = (self.identity, os.environ.get("TORCHELASTIC_RUN_ID"), attempt)
            _starts[place] += 1
            self._prefix = f"bigvision/heartbeats/{attempt}.{_starts[place]}"
            self._threads.append(threading.Thread(target=self._talk, name="heartbeats", daemon=True))
            if self.limits["grace"] is not None and guard.needed():
                self._guard = guard.Guard(self.identity.rank, self.pulse, self.limits["grace"] / 2)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        on_all = isinstance(error, (UserError, Stopped, RankFailure))
        if isinstance(error, Exception) and not on_all and not _came_of_loss(error):
            self._fail(error)
        self.board.enter("close")
        for thread in self._threads[1:]:
            thread.join(1.0)  # it publishes that this rank has left, if the store still answers
        self._threads[0].join()
        if self._guard is not None:
            self._guard.close()
        faulthandler.cancel_dump_traceback_later()
        self._variables.__exit__(None, None, None)

    # Reports of the training loop, in the main thread.

    def beat(self, phase: Phase, step: int) -> None:
        """Report that this rank begins *phase* of *step*, or its next batch: the limit counts from here."""
        board = self.board
        with board.changed:
            board.at = At(phase, step, board.at.count + 1, phase != "save")
            board.since, board.suspended = time.monotonic(), 0.0

    def waits_for_data(self, waits: bool) -> None:
        """Report that this rank begins, or has ended, to wait for (more of) the data of its step; the limit counts on."""
        with self.board.changed:
            self.board.at = self.board.at._replace(count=self.board.at.count + 1, data=waits)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Make an error that came of another rank's end a `RankFailure` that names it; report this rank's own to the others.

        What needs the other ranks is in here: when it ends without an error, this rank has left.
        """
        try:
            yield
        except (UserError, Stopped):
            self.board.enter("leave")
            raise  # the same on every rank
        except BaseException as error:
            if self.identity.world_size == 1:
                raise
            cause = self._find_cause() if _came_of_loss(error) else ""
            if isinstance(error, RankFailure) and not cause:
                self.board.enter("leave")
                raise  # the same on every rank
            self._fail(error, report=not cause)
            self.board.await_rounds(self.pulse)
            if self._holds_store():
                time.sleep(3 * self.pulse)  # for the others to read it
            if not cause:
                raise
            raise RankFailure(f"{cause}; here: {one_line(error)[:200]}") from error
        self.board.enter("leave")

    def _fail(self, error: BaseException, report: bool = True) -> None:
        """Record that *error* ends this rank's work, and *report* it to the others unless they know its cause."""
        with self.board.changed:
            if not self.board.enter("error"):
                return
            self.board.traceback = "".join(traceback.format_exception(error))
        if report and self.identity.world_size > 1:
            self._report(f"rank {self.identity.rank} failed: {type(error).__name__}: {one_line(error)}", False, 1.0)

    def _find_cause(self) -> str:
        """Return whose end broke a collective, in words; empty where nothing is known."""
        deadline = time.monotonic() + self.board.news.patience + 2 * self.pulse
        self.board.await_rounds(self.pulse, asking=True)
        while time.monotonic() < deadline:
            board = self.board.copy()
            if board.fault is not None:
                if board.fault.ends_all:
                    time.sleep(deadline + WRITING - time.monotonic())  # the clock ends this process first, with better words
                return board.fault.text
            if words := "; ".join(diagnosis.missing_ranks(board.news)) or diagnosis.store_lost(board.news):
                return self._report(words, False, self.pulse).text
            time.sleep(min(0.01, self.pulse))
            self.board.await_rounds(self.pulse)
        return ""

    # Shared by the threads.

    def _own_report(self, place: bool) -> Report:
        """What this rank publishes of itself; *place* costs more, and is for a diagnosis."""
        with self.board.changed:
            left = not STATES[self.board.state].needs_others
            report = self.board.news.process | self.board.at._asdict() | {"left": left}
        return report | (diagnosis.current_place(self._main) if place else {})

    def _report(self, text: str, ends_all: bool, patience: float) -> Fault:
        """Report a fault; returns the first one on any rank, or this one when the store takes more than *patience* seconds."""
        board, mine = self.board, Fault(text, ends_all, time.monotonic())
        with board.changed:
            board.to_report = mine
        self.board.await_rounds(patience)
        with board.changed:
            board.fault = board.fault or mine
            return board.fault

    def _holds_store(self) -> bool:
        """Whether the other ranks' store ends with this process; otherwise a launcher or another rank has it."""
        return self.identity.world_size > 1 and self.identity.rank == 0 and not launcher_holds_store()

    # The clock thread.

    def _watch(self) -> None:
        board, turn = self.board, time.monotonic()
        while True:
            with board.changed:
                if board.state != "closed":
                    board.changed.wait(self.pulse)
                if board.state == "closed":
                    return
                now = time.monotonic()
                if now - turn > max(NAP, 2 * self.pulse):
                    board.suspended += now - turn  # a job that was suspended as a whole goes on where it was
                turn = now
            self._look()

    def _look(self) -> None:
        """Compare where this rank is with the limits of its state."""
        now, grace = self.board.copy(), self.limits["grace"]
        if now.fault is None and now.state == "running" and grace is not None and self.identity.world_size > 1:
            self._find_ended(now.news, grace)
            now = self.board.copy()
        if now.fault is not None and self.board.enter("fault"):
            now = self.board.copy()
        state, fault = STATES[now.state], now.fault
        if self._guard is not None:
            known = fault.text if fault is not None and state.needs_others else ""
            self._guard.report(known, diagnosis.local_peers(now.news) if state.needs_others else [])
        if fault is not None and fault.ends_all and state.limits:
            self._end(fault.text, Exit.HUNG)
        counts = {
            "phase": (now.waited(), self.limits[now.at.phase]),
            "grace": (time.monotonic() - fault.since if fault is not None else 0.0, grace),
        }
        for limit in state.limits:
            elapsed, seconds = counts[limit.key]
            if seconds is None or elapsed <= limit.share * seconds:
                continue
            if limit.code == Exit.HUNG:
                self._end(self._explain(now.at, seconds), Exit.HUNG)
            elif fault is not None:
                allowed = f"{limit.share * seconds:g} s later (limits.grace: {seconds:g} s)"
                self._end(f"{fault.text}; {limit.words} {allowed}", limit.code)
        waited, seconds = counts["phase"]
        if seconds is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            # Native code that never lets go of the interpreter stops this thread too; then this ends the process, with code 1.
            faulthandler.dump_traceback_later(max(2 * seconds - waited, self.pulse), exit=True, file=2)

    def _find_ended(self, news: News, grace: float) -> None:
        """Look for ranks whose processes have ended without leaving the run, and report them."""
        if not diagnosis.ended_ranks(news):
            return
        # The last report of such a rank has not been read: it may have left in order.
        self.board.await_rounds(min(news.patience, grace / 4), asking=True)
        board = self.board.copy()
        if board.fault is None and (found := diagnosis.ended_ranks(board.news)):
            self._report("; ".join(found), False, min(2 * self.pulse, grace / 8))

    def _explain(self, at: At, limit: float) -> str:
        """Return why this rank's limit ran out, in the words of the first rank that has reported it."""
        what = f"limits.{at.phase}: {limit:g} s ran out on rank {self.identity.rank}"
        if self.identity.world_size == 1:
            return f"{what} in {diagnosis.describe(self._own_report(place=True))}"
        self.board.await_rounds(self.board.news.patience)  # the last report of each, or the certainty that the store is silent
        board = self.board.copy()
        if board.fault is not None and board.fault.ends_all:
            return board.fault.text
        first = f" after {board.fault.text}" if board.fault is not None else ""
        text = f"{what}{first}: {diagnosis.diagnose(board.news, self._own_report(place=True))}"
        fault = self._report(text, True, min(2 * self.pulse, limit / 4))
        return fault.text if fault.ends_all else text

    def _end(self, text: str, code: Exit) -> None:
        """End this process with *text*, and with the stacks where a limit ran out."""
        rank, hung = self.identity.rank, code == Exit.HUNG
        path = self.folder / f"rank-{rank}.txt" if hung and self.folder is not None else None
        line = f"error: rank {rank}: {text}{f'; stacks: {path}' if path is not None else ''}\n"
        stacks = f"rank {rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {text}\n\n{all_stacks()}\n"
        before = stacks if hung else self.board.copy().traceback
        _in_time(lambda: _write(2, f"\n{before}{line}"), lambda: _write(path, stacks) if path is not None else None)
        if path is not None:
            # The driver may not answer while it holds the interpreter: then this ends the process, with code 1.
            faulthandler.dump_traceback_later(WRITING, exit=True, file=2)
            _in_time(lambda: _write(path.with_name(f"nccl-{rank}.json"), nccl_trace()))
        if hung and self._holds_store():
            time.sleep(4 * self.pulse)  # the others have yet to read why
        os._exit(code)

    # The store thread.

    def _talk(self) -> None:
        """Exchange reports each pulse, over a connection of its own."""
        board, store, last = self.board, None, False
        while not last:
            with board.changed:
                last = board.state == "closed"
            try:
                store = store or self._connect()
                self._exchange(store)
            except Exception:
                store = None  # gone, or not there yet
            with board.changed:
                board.rounds += 1
                board.changed.notify_all()
                board.changed.wait_for(lambda: board.state == "closed" or board.rounds < board.wanted, self.pulse)

    def _connect(self) -> dist.Store:
        address, port, refused = self.identity.address, self.identity.port, False
        try:
            # TCPStore fills the screen when nobody listens.
            socket.create_connection((address, port), timeout=max(1.0, self.pulse)).close()
        except ConnectionRefusedError:
            refused = True
            raise
        finally:
            with self.board.changed:
                self.board.news.refused = refused
        return dist.PrefixStore(self._prefix, dist.TCPStore(address, port, None, False, CONNECT, wait_for_workers=False))

    def _exchange(self, store: Any) -> None:
        """Report a fault or look for one, publish where this rank is, and read where the others are when somebody asks."""
        board, rank = self.board, self.identity.rank
        with board.changed:
            fault, mine, news, number = board.fault, board.to_report, board.news, board.rounds
            known, limit = set(news.heard), self.limits[board.at.phase]
            curious = board.asking or len(known) < self.identity.world_size - 1
            curious = curious or (limit is not None and board.waited() > limit / 2)
            news.reading_since = min(news.reading_since, time.monotonic()) if curious else math.inf
        if mine is not None:
            self._take_fault(store.compare_set("fault", "", json.dumps([mine.text, mine.ends_all])))
        elif fault is None and store.check(["fault"]):
            self._take_fault(store.get("fault"))
        store.set(str(rank), json.dumps(self._own_report(curious) | {"number": number}))
        others = [other for other in range(self.identity.world_size) if other != rank] if curious else []
        ready = [other for other in others if other in known or store.check([str(other)])]  # to read one waits for it
        reports = [json.loads(text) for text in store.multi_get([str(other) for other in ready])] if ready else []
        with board.changed:
            for other, report in zip(ready, reports):
                if other not in known or news.heard[other].report["number"] != report["number"]:
                    news.heard[other] = Heard(report, time.monotonic())
            news.answered, news.reached = time.monotonic(), True

    def _take_fault(self, text: bytes) -> None:
        """Take the fault that the store has as the first one."""
        board, (words, ends_all) = self.board, json.loads(text)
        with board.changed:
            since = board.fault.since if board.fault is not None else time.monotonic()
            board.fault, board.to_report = Fault(words, ends_all, since), None
            board.changed.notify_all()


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


def _in_time(*works: Callable[[], None]) -> None:
    """Do each in a thread of its own, and wait for them no longer than `WRITING`."""
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    deadline = time.monotonic() + WRITING
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _write(target: Path | int, content: str | bytes) -> None:
    """Write to a file, or to a descriptor, as far as it is possible; no content makes no file."""
    data = content.encode(errors="replace") if isinstance(content, str) else content
    with suppress(OSError):
        if data and isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
        if data:
            with open(target, "wb", closefd=isinstance(target, Path)) as file:
                file.write(data)
