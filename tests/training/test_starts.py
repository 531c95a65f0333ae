"""A run that cannot get any further is not started for ever; one that is killed at random is."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bigvision import load_config
from bigvision.errors import Exit, Stopped, UserError
from bigvision.monitor import read_lines
from bigvision.runtime import RankFailure
from bigvision.training.run_folder import STARTS, Starts
from tests.cli.test_mistakes import refused
from tests.distributed import start_ranks
from tests.launch.commands import BIN, ROOT, TORCHRUN, start
from tests.recipes import digests, losses, recipe, write
from tests.training.test_stopping import ended, train


def train_and_crash(path: str, rank: int, step: int) -> None:
    """The command; *rank* raises at *step* (-1: while the model is built), each time."""
    from bigvision.engine import Engine
    from bigvision.training import build

    owner, name = (build, "build_engine") if step < 0 else (Engine, "_passes")
    inner = getattr(owner, name)

    def crash(*args: Any, **kwargs: Any) -> Any:
        if os.environ["RANK"] == str(rank) and (step < 0 or args[0].step == step):
            raise ValueError("no such luck")
        return inner(*args, **kwargs)

    setattr(owner, name, crash)
    train(path)


def noted(out: Path, key: str) -> list[Any]:
    found = [json.loads(line) for line in (out / STARTS).read_text().splitlines()]
    return [line[key] for line in found if key in line]


@pytest.mark.parametrize(("rank", "step"), [(1, 5), pytest.param(0, -1, marks=pytest.mark.long)])
def test_the_same_crash_again_and_again_ends_it(tmp_path: Path, rank: int, step: int) -> None:
    out = tmp_path / "out"
    made = recipe(out, train={"steps": 8}, checkpoint={"every": 2}, faults={"same_crash": 2})
    path = write(tmp_path, made)
    for _ in range(2):
        assert ended(train_and_crash, 2, path, rank, step) == [Exit.FAULT] * 2
    assert noted(out, "crash") == [step] * 2 and noted(out, "rank") == [rank] * 2
    assert noted(out, "step") == ([0, 4] if step >= 0 else [0, 0])
    assert ended(train, 2, path) == [Exit.MISTAKE] * 2
    where = "at step 5" if step >= 0 else "before its first step"
    refused(["train", path], f"2 starts in a row crashed {where}", f"rank {rank}: ValueError: no such luck", str(out / STARTS))
    assert ended(train, 2, write(tmp_path, made | {"faults": {"same_crash": 3}})) == [0, 0], "another configuration"
    assert noted(out, "end") == ["done"]


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (UserError("data.train: no such folder"), False),
        (Stopped("SIGTERM", 0, Path("step-00000000")), False),
        (KeyboardInterrupt(), False),
        (RankFailure("rank 1 is gone"), True),
        (SystemExit(1), True),
    ],
)
def test_what_counts_as_a_restart(error: BaseException, counts: bool, tmp_path: Path) -> None:
    """A mistake and a stop, of a scheduler's or a user's, leave nothing to be given up; also where a kill has cut a line."""
    config = load_config(recipe(tmp_path, faults={"restarts": 3}))
    starts = Starts(config, mock.Mock(is_main=True, rank=0, world_size=1))
    for number in range(9):
        if counts and number > 3:
            with pytest.raises(
                UserError, match=r"^faults\.restarts: 4 starts in a row from step 0 came to no newer checkpoint"
            ):
                starts.begin(0)
            return
        starts.begin(0)
        with suppress(type(error)), starts.logged():
            raise error
        if number % 2:
            starts.path.write_bytes(starts.path.read_bytes() + b'{"time": "20\xff')
    assert noted_starts(starts.path) == list(range(1, 10))


def noted_starts(path: Path) -> list[int]:
    return [line["start"] for line in read_lines(path) if "start" in line]


@pytest.mark.long
def test_kills_are_not_taken_for_crashes_but_counted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write(tmp_path, recipe(out, train={"steps": 9000}, faults={"same_crash": 1, "restarts": 1}))
    for number in range(2):
        processes = start_ranks(train, 2, path)
        deadline = time.monotonic() + 60
        while (len(noted(out, "start")) if (out / STARTS).exists() else 0) <= number and time.monotonic() < deadline:
            time.sleep(0.02)
        processes[1].kill()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [Exit.FAULT, -signal.SIGKILL]
    assert noted(out, "crash") == []
    assert ended(train, 2, path) == [Exit.MISTAKE] * 2


@pytest.mark.long
def test_torchrun_gives_up_on_a_crash_and_not_on_kills(tmp_path: Path) -> None:
    """Five restarts are allowed; the crash uses two, what is left over is refused at once."""
    program = tmp_path / "crash.py"
    program.write_text(
        "import sys\nfrom tests.training.test_starts import train_and_crash\ntrain_and_crash(sys.argv[1], 1, 5)\n"
    )
    out = tmp_path / "out"
    path = write(tmp_path, recipe(out, train={"steps": 8}, checkpoint={"every": 2}))
    command = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "4", "--rdzv-endpoint", str(tmp_path / "meet")]
    done = start([*command, str(program), path], PYTHONPATH=os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    assert done.returncode != 0 and "faults.same_crash: 3 starts in a row crashed at step 5" in done.stderr
    assert noted(out, "start") == [1, 2, 3]


@pytest.mark.long
def test_killed_under_torchrun_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL of one rank at random moments; torchrun starts all again, and the run goes on by itself."""
    steps, kills, ranks, rng = 200, 20, 2, random.Random(20)
    made = recipe(tmp_path / "whole", train={"steps": steps, "eval_every": 40}, checkpoint={"every": 5})
    assert ended(train, ranks, write(tmp_path, made)) == [0] * ranks
    out = tmp_path / "killed"
    path = write(tmp_path, made | {"out": str(out)})
    command = [*TORCHRUN, "--nproc-per-node", str(ranks), "--max-restarts", str(kills + 5), "--monitor-interval", "0.1"]
    command += ["--rdzv-endpoint", str(tmp_path / "meet"), "launch/train.py", path]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    agent = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.append(agent.stderr.read()))  # type: ignore[union-attr]
    reader.start()
    killed = 0
    try:
        for number in range(kills):
            # Most of them while it trains, each later than the one before by steps that are drawn; some while it starts.
            target = (number + 1) * steps // (kills + 2) if number % 4 else 0
            wait_for(lambda target=target: steps_so_far(out) >= target or agent.poll() is not None)
            wait_for(lambda: len(children(agent.pid)) == ranks or agent.poll() is not None)
            time.sleep(rng.random() * (0.3 if target else 6))
            victims = children(agent.pid)
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
                killed += 1
                wait_for(lambda victims=victims: not set(children(agent.pid)) & set(victims) or agent.poll() is not None)
        assert agent.wait(600) == 0, "".join(said)[-3000:]
    finally:
        agent.terminate()
        agent.wait()
        reader.join()
    print(f"{killed} kills, {len(noted(out, 'start'))} starts")
    assert killed == kills
    assert digests(out / f"step-{steps:08}") == digests(tmp_path / "whole" / f"step-{steps:08}")
    assert losses(out) == losses(tmp_path / "whole")


def wait_for(what: Any, limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)


def steps_so_far(out: Path) -> int:
    path = out / "metrics.jsonl"
    found = (
        [json.loads(line).get("step", 0) for line in path.read_text().splitlines() if line.endswith("}")]
        if path.exists()
        else []
    )
    return max(found, default=0)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(text) for text in path.read_text().split()] if path.exists() else []
