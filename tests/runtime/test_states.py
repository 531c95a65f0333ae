"""The watchdog's table of states, without processes: what ends a rank in each state, and what does not."""

from __future__ import annotations

import faulthandler
import threading
import time
from unittest import mock

import pytest

from bigvision.config import LimitsConfig
from bigvision.errors import Exit
from bigvision.runtime import Identity, Watchdog
from bigvision.runtime.diagnosis import News, this_process
from bigvision.runtime.watchdog import STATES, At, Board, Event, Fault

LIMITS = LimitsConfig(step=10.0, grace=4.0)


def look(state: str, beat: float, fault: float | None, ends_all: bool = False) -> tuple[int | None, str, bool]:
    """One look of the clock, seconds after the last beat and after a fault: the exit code, the state after it, and "left"."""
    watch, now = Watchdog(LIMITS), time.monotonic()
    watch.identity, watch._main = Identity(1, 2, 1, 2, "slurm", "127.0.0.1", 1), threading.get_ident()
    watch.board = Board(News(watch.identity, this_process(), 0.01), state=state, at=At("step", 3), since=now - beat)
    watch.board.fault = Fault("rank 0 failed", ends_all, now - fault) if fault is not None else None
    with mock.patch.object(watch, "_end", side_effect=SystemExit) as end:
        try:
            watch._look()
        except SystemExit:
            pass
        finally:
            faulthandler.cancel_dump_traceback_later()
    return end.call_args.args[1] if end.called else None, watch.board.state, watch._own_report(place=False)["left"]


@pytest.mark.parametrize(
    ("state", "beat", "fault", "code"),
    [
        ("running", 9, None, None), ("running", 11, None, Exit.HUNG), ("left", 11, None, Exit.HUNG),
        ("failed", 11, 1, Exit.HUNG), ("closed", 11, 9, None),
        ("running", 1, 1.5, None), ("running", 1, 2.5, Exit.FAULT), ("lost", 1, 1.5, None), ("lost", 1, 2.5, Exit.FAULT),
        ("failed", 1, 2.5, None), ("failed", 1, 4.5, Exit.FAULT), ("left", 1, 9, None),
    ],
)  # fmt: skip
def test_limits_end_a_rank(state: str, beat: float, fault: float | None, code: int | None) -> None:
    after = "lost" if state == "running" and fault is not None else state
    assert look(state, beat, fault) == (code, after, state in ("failed", "left", "closed"))


def test_a_limit_on_another_rank_ends_every_state_but_the_last() -> None:
    codes = {state: look(state, 1, 0.0, ends_all=True)[0] for state in STATES}
    assert codes == dict.fromkeys(STATES, Exit.HUNG) | {"closed": None}


def test_every_event_has_a_state_that_follows() -> None:
    events: tuple[Event, ...] = ("fault", "error", "leave", "close")
    assert {getattr(row, event) for row in STATES.values() for event in events} <= STATES.keys()
    board = Board(News(Identity(0, 2, 0, 2, "slurm"), {}, 1.0))
    assert board.enter("fault") and board.enter("error") and not board.enter("leave"), "a rank that has failed has not left"
    assert board.enter("close") and not board.enter("error") and board.state == "closed"
