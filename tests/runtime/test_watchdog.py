"""Ranks that stop, hang and die: the others end in time and say which it was."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks, start_ranks
from tests.launch.commands import TORCHRUN, start
from tests.recipes import losses, recipe, write, write_recipe
from tests.runtime import hangs
from tests.runtime.hangs import LIMIT, Ended, clean_up, run_and_hang

AMPLE = 120.0
PLACES = ("start", "step", "evaluate", "save")
PHASES = {"data": "step", "more data": "step"}


def limit_at(place: str) -> float:
    """Also on a busy machine a start takes less."""
    return 10.0 if place == "start" else LIMIT


def hang(folder: Path, place: str, act: Callable[[], None], victim: int, ranks: int = 3, **sections: dict[str, Any]) -> Ended:
    """A run with one short limit, that of the phase in which *victim* does *act*."""
    limits = dict.fromkeys(PLACES, AMPLE) | {PHASES.get(place, place): limit_at(place)}
    train = {"steps": 20, "eval_every": 4, "micro_batch": 4}
    plain = recipe(
        folder / "out", limits=limits, train=train, checkpoint={"every": 6, "background": False}, **sections
    )  # fmt: skip
    return run_and_hang(folder, plain, place, act, victim, ranks)


def check_hung(ended: Ended, folder: Path, place: str, victim: int, words: str, ends: bool) -> None:
    """All ranks ended in time, the victim too where it *ends*; they name it, and their stacks are written."""
    ranks = [rank for rank in range(len(ended.codes)) if ends or rank != victim]
    try:
        assert all(ended.codes[rank] == 124 for rank in ranks), (ended.codes, ended.said)
        assert 0 < ended.after < 2 * limit_at(place), ended.after
        for rank in ranks:
            what = rf"limits\.{PHASES.get(place, place)}: {limit_at(place):g} s ran out on rank \d"
            pattern = rf"error: rank {rank}: {what}: rank {victim} .*{words}.*"
            assert re.fullmatch(pattern, ended.errors[rank]), ended.errors[rank]
            stacks = (folder / "out" / "stacks" / f"rank-{rank}.txt").read_text()
            assert "thread MainThread:" in stacks and stacks in ended.said[rank]
        if ended.codes[0] == 124:
            texts = {ended.errors[rank].partition(": ")[2].partition(": ")[2].rpartition("; stacks: ")[0] for rank in ranks}
            assert len(texts) == 1, "they agree, by the store"
    finally:
        clean_up(ended.processes)


@pytest.mark.parametrize(
    ("place", "victim", "ranks"),
    [
        pytest.param(place, victim, ranks, marks=[pytest.mark.long] * ((place, victim, ranks) not in SHORT))
        for SHORT in [{("step", 0, 3)}]
        for place in PLACES
        for ranks in (3, 4)
        for victim in range(ranks)
    ],
)
def test_a_stopped_rank_is_named(place: str, victim: int, ranks: int, tmp_path: Path) -> None:
    ended = hang(tmp_path, place, hangs.stop, victim, ranks)
    stopped = ended.processes[victim]
    assert stopped.pid is not None and ended.codes[victim] is None
    os.kill(stopped.pid, signal.SIGCONT)
    stopped.join(60)
    # It learns of it from the store; where it held the store itself, from its connections or by its own limit.
    assert stopped.exitcode in (124, 1), stopped.exitcode
    check_hung(ended, tmp_path, place, victim, "is stopped by a signal", ends=False)


@pytest.mark.parametrize(
    ("place", "act", "victim", "words"),
    [
        pytest.param(
            "data", hangs.loop_for_ever, 1, r"is behind, in step 3, without its data yet, at loop_for_ever \(runtime/hangs.*",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "more data", hangs.loop_for_ever, 1, r"is behind, in step 3, without its data yet, at loop_for_ever.*",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "data", hangs.sleep_for_ever, 0, r"is behind, in step 3, without its data yet, at sleep_for_ever.*",
            marks=pytest.mark.long,
        ),
        ("step", hangs.sleep_for_ever, 2, r"is behind, in step 3, at sleep_for_ever.*"),
        pytest.param(
            "evaluate", hangs.sleep_for_ever, 1, r"is behind, in the evaluation after step 4, at sleep_for_ever.*",
            marks=pytest.mark.long,
        ),
        pytest.param(
            "start", hangs.sleep_for_ever, 1, r"is behind, in the start, at sleep_for_ever.*", marks=pytest.mark.long
        ),
        pytest.param(
            "save", hangs.sleep_for_ever, 2, r"is behind, in the saving of step 6, at sleep_for_ever.*", marks=pytest.mark.long
        ),
    ],
)  # fmt: skip
def test_a_rank_that_hangs_is_named(place: str, act: Callable[[], None], victim: int, words: str, tmp_path: Path) -> None:
    ended = hang(tmp_path, place, act, victim)
    for process in ended.processes:
        process.join(20)
    ended.codes = [process.exitcode for process in ended.processes]
    check_hung(ended, tmp_path, place, victim, words, ends=True)
    assert f"in {act.__name__}" in (tmp_path / "out" / "stacks" / f"rank-{victim}.txt").read_text()


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fsdp", "zero1", "zero3", "pipeline"])
@pytest.mark.parametrize("act", [hangs.stop, hangs.sleep_for_ever])
def test_under_every_strategy(strategy: str, act: Callable[[], None], tmp_path: Path) -> None:
    ended = hang(tmp_path, "step", act, 1, parallel={"strategy": strategy})
    for process in ended.processes[:1] + ended.processes[2:]:
        process.join(20)
    ended.codes = [process.exitcode for process in ended.processes]
    words = "is stopped by a signal" if act is hangs.stop else "is behind, in step 3, at sleep_for_ever"
    check_hung(ended, tmp_path, "step", 1, words, ends=False)


@pytest.mark.long
def test_native_code_that_holds_the_interpreter(tmp_path: Path) -> None:
    """No thread of its rank gets a turn: the others name it, and faulthandler ends it."""
    ended = hang(tmp_path, "step", hangs.hold_the_interpreter, 1)
    ended.processes[1].join(2 * LIMIT)
    assert ended.processes[1].exitcode == 1
    assert "in hold_the_interpreter" in (tmp_path / "said-1").read_text()
    check_hung(ended, tmp_path, "step", 1, "does not answer", ends=False)


@pytest.mark.parametrize(
    ("victim", "act"),
    [
        (0, hangs.die),
        pytest.param(2, hangs.die, marks=pytest.mark.long),
        pytest.param(0, hangs.die_out_of_sight, marks=pytest.mark.long),
        pytest.param(2, hangs.die_out_of_sight, marks=pytest.mark.long),
    ],
)
def test_a_killed_rank_is_named(victim: int, act: Callable[[], None], tmp_path: Path) -> None:
    """Without a launcher that ends the others; rank 0 takes the store with it."""
    ended = hang(tmp_path, "step", act, victim)
    # Out of sight rank 0 is known to be gone where the port of its store refuses connections before anybody misses an answer.
    words = "is gone" if act is hangs.die else "(does not answer|is gone .*refuses connections)"
    try:
        assert ended.codes == [-9 if rank == victim else 1 for rank in range(3)], ended.said
        for rank in {0, 1, 2} - {victim}:
            assert re.fullmatch(rf"error: rank {rank}: RankFailure: rank {victim} .*{words}.*; here: .*", ended.errors[rank])
    finally:
        clean_up(ended.processes)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.long), 1])
def test_an_error_on_one_rank_is_told_by_all(victim: int, tmp_path: Path) -> None:
    ended = hang(tmp_path, "data", hangs.fail, victim)
    try:
        ended.processes[victim].join(20)
        assert [process.exitcode for process in ended.processes] == [1, 1, 1], ended.said
        first = f"rank {victim} failed: ValueError: planted in one rank"
        for rank in {0, 1, 2} - {victim}:
            assert ended.errors[rank].startswith(f"error: rank {rank}: RankFailure: {first}; here: "), ended.errors[rank]
        assert f"error: rank {victim}: ValueError: planted in one rank" in ended.said[victim]
    finally:
        clean_up(ended.processes)


GRACE = 8.0
"""Half of it is the margin of a busy machine."""


@pytest.mark.parametrize(
    ("act", "block", "victim"),
    [
        pytest.param(act, block, victim, marks=[] if (act, block, victim) == SHORT else [pytest.mark.long])
        for SHORT in [(hangs.die, hangs.hold_the_interpreter, 0)]
        for act in (hangs.fail, hangs.die)
        for block in (hangs.wait_in_the_driver, hangs.hold_the_interpreter, hangs.hold_under_nohup)
        for victim in (0, 1)
    ],
)
def test_ranks_that_block_end_after_a_fault(
    act: Callable[[], None], block: Callable[[], None], victim: int, tmp_path: Path
) -> None:  # fmt: skip
    """As under NCCL: no exception comes. They do not wait for limits.step, and take the exit code of a fault.

    Under nohup a hang-up must not end them: what holds the interpreter can then be ended by SIGKILL alone.
    """
    plain = recipe(tmp_path / "out", limits={"grace": GRACE}, train={"steps": 20, "micro_batch": 4})
    ended = run_and_hang(tmp_path, plain, "step", act, victim, 3, block)
    try:
        ended.processes[victim].join(20)
        assert ended.processes[victim].exitcode == (-9 if act is hangs.die else 1)
        code = -9 if block is hangs.hold_under_nohup else 1
        assert all(ended.codes[rank] == code for rank in {0, 1, 2} - {victim}), (ended.codes, ended.said)
        assert 0 < ended.after < GRACE, ended.after
        # A rank whose interpreter is held hears of no report; its guard sees the process end.
        reported = act is hangs.fail and block is hangs.wait_in_the_driver
        words = r"failed: ValueError: planted in one rank" if reported else r"is gone \(process \d+ on host .*\)"
        native = "; native code held the interpreter of this rank"
        held = "; it still waited" if block is hangs.wait_in_the_driver else native
        for rank in {0, 1, 2} - {victim}:
            assert re.match(rf"error: rank {rank}: rank {victim} {words}.*{held}", ended.errors[rank]), ended.errors
        if act is hangs.fail:
            assert "ValueError: planted in one rank" in ended.errors[victim]
        assert not (tmp_path / "out" / "stacks").exists(), "nothing hung"
    finally:
        clean_up(ended.processes)


LATE = """
import signal, time
from bigvision.runtime.guard import Guard
signal.signal(signal.SIGHUP, signal.SIG_DFL)
guard = Guard(0, 0.05, {grace})
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
guard.report("rank 1 failed", [])
time.sleep({grace} + {late})
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGHUP])
time.sleep(30)
"""


@pytest.mark.parametrize(("grace", "late", "code"), [(1.5, 1.2, 1), (0.4, 20.0, -9)])
def test_a_rank_that_comes_late_to_its_end_has_the_code_of_a_fault(grace: float, late: float, code: int) -> None:
    """A busy machine may not give it a turn for a second; one that never ends by itself is killed."""
    done = start([sys.executable, "-c", LATE.format(grace=grace, late=late)])
    assert done.returncode == code and "error: rank 0: rank 1 failed; native code held" in done.stderr, done.stderr


def test_ranks_that_leave_in_order_are_no_fault(tmp_path: Path) -> None:
    """Rank 1 is busy with something of its own when the others, and the store with them, have been gone for long."""
    plain = recipe(tmp_path / "out", limits={"grace": 1.0}, train={"steps": 3})
    ended = run_and_hang(tmp_path, plain, "end", hangs.sleep_a_little, 1, 3)
    try:
        ended.processes[1].join(30)
        assert [process.exitcode for process in ended.processes] == [0, 0, 0], ended.said
    finally:
        clean_up(ended.processes)


@pytest.mark.long
def test_a_rank_that_blocks_after_its_own_error_ends_too(tmp_path: Path) -> None:
    plain = recipe(tmp_path / "out", limits={"grace": GRACE}, train={"steps": 20, "micro_batch": 4})
    ended = run_and_hang(tmp_path, plain, "step", hangs.fail_and_block, 2, 3, hangs.wait_in_the_driver)
    try:
        ended.processes[2].join(2 * GRACE)
        assert [process.exitcode for process in ended.processes] == [1, 1, 1], ended.said
        assert "Traceback" in ended.said[2] and "raise ValueError" in ended.said[2]
        words = f"rank 2 failed: ValueError: planted in one rank; it had not cleaned up {GRACE:g} s later"
        assert ended.errors[2].startswith(f"error: rank 2: {words}"), ended.errors
    finally:
        clean_up(ended.processes)


@pytest.mark.long
def test_a_store_that_refuses_connections_tells_other_hosts(tmp_path: Path) -> None:
    """Nobody can look at rank 0, which is killed; a peer on another host than the store's is only silent."""
    plain = recipe(tmp_path / "out", limits={"grace": GRACE, "step": 30.0}, train={"steps": 20, "micro_batch": 4})
    ended = run_and_hang(tmp_path, plain, "step", hangs.die_out_of_sight, 0, 3, hangs.wait_in_the_driver)
    try:
        assert ended.codes == [-9, 1, 1] and 0 < ended.after < GRACE, (ended.codes, ended.after, ended.said)
        for rank in (1, 2):
            assert re.match(rf"error: rank {rank}: rank 0 is gone.*: the store .* refuses connections", ended.errors[rank])
    finally:
        clean_up(ended.processes)


@pytest.mark.parametrize("absent", [1, pytest.param(0, marks=pytest.mark.long)])
def test_a_rank_that_does_not_come_is_named(absent: int, tmp_path: Path) -> None:
    plain = recipe(tmp_path / "out", limits={"start": LIMIT})
    write(tmp_path, plain)
    processes = start_ranks(hangs.train_unless, 3, tmp_path, absent)
    try:
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0 if rank == absent else 124 for rank in range(3)]
        words = "rank 0 does not answer at .*: it has not come" if absent == 0 else "rank 1 has not come"
        for rank in {0, 1, 2} - {absent}:
            said = (tmp_path / f"said-{rank}").read_text()
            assert re.search(rf"error: rank {rank}: limits\.start: {LIMIT:g} s ran out on rank \d: {words}", said), said
    finally:
        clean_up(processes)


@pytest.mark.long
def test_a_slow_first_step_is_no_alarm(tmp_path: Path) -> None:
    """As with compilation: the limit is of the whole step, and null is none."""
    found = [
        run_ranks(hangs.run_slowly, 2, recipe(tmp_path / name, train={"steps": 4}, limits=dict.fromkeys(PLACES, limit)), 3.0)
        for name, limit in (("some", 60.0), ("none", None))
    ]
    assert found[0] == found[1] and not (tmp_path / "some" / "stacks").exists()


@pytest.mark.long
def test_a_job_that_was_suspended_goes_on(tmp_path: Path) -> None:
    plain = recipe(tmp_path / "out", train={"steps": 8}, limits={"step": 6.0})
    write(tmp_path, plain)
    processes = start_ranks(hangs.train, 3, tmp_path, "step", hangs.sleep_a_little, 1)
    try:
        while not (tmp_path / "mark").exists():
            time.sleep(0.05)
        for process in processes:
            os.kill(process.pid or 0, signal.SIGSTOP)
        time.sleep(9)
        for process in processes:
            os.kill(process.pid or 0, signal.SIGCONT)
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0], (tmp_path / "said-0").read_text()
        assert len(losses(tmp_path / "out")) == 8
    finally:
        clean_up(processes)


@pytest.mark.long
def test_one_rank_alone(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, limits={"step": 2.0}, train={"micro_batch": 12})
    done = start([sys.executable, "-m", "tests.runtime.hangs", path, "data", "0"])
    assert done.returncode == 124
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: rank 0: limits.step: 2 s ran out on rank 0 in step 3, without its data yet, at sleep_for"), (
        line
    )
    assert "in sleep_for_ever" in (tmp_path / "out" / "stacks" / "rank-0.txt").read_text()


@pytest.mark.long
def test_under_torchrun(tmp_path: Path) -> None:
    """The launcher holds the store, so that rank 0 is missed as any other."""
    path = write_recipe(tmp_path, limits={"step": LIMIT})
    command = [*TORCHRUN, "--nproc-per-node", "3", "-m", "tests.runtime.hangs", path, "data", "0"]
    done = start(command, timeout=300)
    assert done.returncode != 0
    found = re.findall(
        r"^error: rank (\d): limits\.step: .*rank 0 is behind, in step 3, without its data yet", done.stderr, re.M
    )
    assert sorted(found) == ["0", "1", "2"], done.stderr
    assert len(list((tmp_path / "out" / "stacks").iterdir())) == 3
