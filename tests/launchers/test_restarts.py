"""``bigvision train --restarts``: what becomes of a rank that is killed, and of it when its parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigvision.errors import Exit
from bigvision.signals import STOP
from tests.distributed import run_ranks
from tests.launchers.programs import ended, forks, small
from tests.recipes import losses, run, write
from tests.training.test_starts import noted

STEPS = 60


def plain(out: Path, **train: Any) -> dict[str, Any]:
    return small(out, train={"steps": STEPS} | train, data={"workers": 1}, checkpoint={"every": 5})


def start(folder: Path, recipe: dict[str, Any], *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bigvision.cli", "train", write(folder, recipe), *options], cwd=folder, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def until(program: subprocess.Popen[str], what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 120
    while not (found := what()):
        assert program.poll() is None and time.monotonic() < deadline, program.communicate()
        time.sleep(0.02)
    return found


def kill_a_start(program: subprocess.Popen[str], out: Path, number: int, step: int = 0) -> None:
    """Kill the last rank of its start *number*, once the run has come to *step*."""
    until(program, lambda: (out / "starts.jsonl").exists() and len(noted(out, "start")) == number)
    until(program, lambda: step == 0 or ((out / "metrics.jsonl").exists() and len(losses(out)) >= step))
    os.kill(forks(program)[-1], signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_rank_is_started_again_and_ends_with_the_bits_of_a_run_left_alone(ranks: int, tmp_path: Path) -> None:
    """And a rank whose parent is killed saves and ends, with all that it has started."""
    out = tmp_path / "out"
    counts = ["--ranks", str(ranks)] if ranks > 1 else []
    program = start(tmp_path, plain(out), *counts, "--restarts", "2")
    kill_a_start(program, out, 1, step=12)
    kill_a_start(program, out, 2)
    until(program, lambda: len(noted(out, "start")) == 3 and len(losses(out)) >= 20)
    program.kill()
    code, _, said = ended(program, tmp_path)
    assert code == -signal.SIGKILL and said.count("killed by SIGKILL") == 2
    assert "starting the ranks again (2 of at most 2)" in said
    program = start(tmp_path, plain(out), *counts)
    assert ended(program, tmp_path)[0] == 0
    assert losses(out) == run_ranks(run, ranks, plain(tmp_path / "whole"))[0]


@pytest.mark.long
def test_the_restarts_have_an_end_and_a_stop_is_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = start(tmp_path, plain(out, steps=100000), "--restarts", "1")
    for number in (1, 2):
        kill_a_start(program, out, number)
    code, _, said = ended(program, tmp_path)
    assert code == Exit.FAULT and said.splitlines()[-1].startswith("error: rank 0: killed by SIGKILL")
    # A stop of the parent, and one of its rank: saved, and not started again. Ctrl-C at a terminal goes to both.
    for number, at in enumerate((*STOP, "rank"), start=3):
        program = start(tmp_path, plain(out, steps=100000), "--restarts", "1")
        until(program, lambda number=number: len(noted(out, "start")) == number)
        before = losses(out) if (out / "metrics.jsonl").exists() else []
        until(program, lambda before=before: (out / "metrics.jsonl").exists() and len(losses(out)) > len(before))
        if at == "rank":
            os.kill(forks(program)[-1], signal.SIGTERM)
        elif at == signal.SIGINT:
            os.killpg(program.pid, signal.SIGINT)
        else:
            program.send_signal(int(at))
        code, _, said = ended(program, tmp_path)
        assert code == Exit.STOPPED and "saved in" in said and len(noted(out, "start")) == number, said


@pytest.mark.long
def test_a_stop_before_the_run_began(tmp_path: Path) -> None:
    program = start(tmp_path, plain(tmp_path / "out"), "--restarts", "1")
    until(program, lambda: forks(program))
    program.send_signal(signal.SIGTERM)
    assert ended(program, tmp_path)[0] == Exit.STOPPED and not (tmp_path / "out" / f"step-{STEPS:08}").exists()
