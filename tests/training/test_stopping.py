"""A signal to stop, to any rank at any time: a checkpoint, the documented exit code, in time, and nothing lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bigvision import checkpoint
from bigvision.checkpoint.commands import run_checkpoint
from bigvision.errors import Exit
from tests.distributed import free_port, start_ranks
from tests.recipes import digests, lines, losses, recipe, write

ROOT = Path(__file__).parents[2]
STEPS = 12


def plain(out: Path, strategy: str = "ddp", **sections: dict[str, Any]) -> dict[str, Any]:
    usual: dict[str, dict[str, Any]] = {
        "train": {"steps": STEPS, "eval_every": 4}, "checkpoint": {"every": 5, "keep": 99}, "parallel": {"strategy": strategy},
    }  # fmt: skip
    return recipe(out, **usual | sections)


def train(path: str) -> None:
    """The command, on this rank."""
    from bigvision.cli import main

    sys.exit(main(["train", path]))


def train_and_signal(path: str, place: str, count: int, rank: int, number: int) -> None:
    """The command; *rank* gets a signal in the *count*-th call of a *place*, once it is in there."""
    from bigvision.checkpoint import commit
    from bigvision.engine import Engine
    from bigvision.training import build, data

    places: dict[str, tuple[Any, str]] = {
        "load": (build, "build_model"),
        "step": (Engine, "train_step"),
        "evaluate": (data.Validation, "__next__"),
        "save": (commit, "commit"),
    }
    owner, name = places[place]
    inner, calls = getattr(owner, name), [0]

    def asked(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if os.environ["RANK"] == str(rank) and calls[0] == count:
            os.kill(os.getpid(), number)
        return inner(*args, **kwargs)

    setattr(owner, name, asked)
    train(path)


def ended(target: Callable[..., None], ranks: int, *arguments: Any) -> list[int | None]:
    """Exit codes."""
    processes = start_ranks(target, ranks, *arguments)
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three ranks that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole")
    assert ended(train, 3, write(out, plain(out / "out"))) == [0, 0, 0]
    return out / "out"


def same_end(out: Path, whole: Path) -> None:
    """What two runs leave is equal to the bit, also what they measured on the way."""
    assert digests(out / f"step-{STEPS:08}") == digests(whole / f"step-{STEPS:08}")
    assert losses(out) == losses(whole)
    values = [[(line["step"], line["val_loss"]) for line in lines(run) if "val_loss" in line] for run in (out, whole)]
    assert values[0] == values[1]


TERM, USR1 = signal.SIGTERM, signal.SIGUSR1


@pytest.mark.parametrize(
    ("place", "count", "step", "rank", "number"),
    [
        ("load", 1, 0, 1, TERM), pytest.param("step", 2, 2, 0, USR1, marks=pytest.mark.long), ("save", 1, 5, 1, TERM),
        pytest.param("evaluate", 2, 4, 2, TERM, marks=pytest.mark.long),
        pytest.param("evaluate", 12, 12, 0, TERM, marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_signal_anywhere_saves_and_ends_all_ranks(
    tmp_path: Path, whole: Path, place: str, count: int, step: int, rank: int, number: signal.Signals
) -> None:
    out = tmp_path / "out"
    path = write(tmp_path, plain(out))
    assert ended(train_and_signal, 3, path, place, count, rank, number) == [Exit.STOPPED] * 3
    # Training may be further when a save in the background begins.
    stopped_at = checkpoint.steps_in(out)[0]
    assert step <= stopped_at <= step + 3 or (place == "save" and stopped_at >= step), "within three further steps"
    assert run_checkpoint(["verify", str(out)]) == 0
    assert ended(train, 3, path) == [0, 0, 0]
    same_end(out, whole)


@pytest.mark.long
@pytest.mark.parametrize(
    ("strategy", "ranks", "keys"),
    [
        ("fsdp", 4, {"replicas": 2}), ("zero1", 3, {}), ("zero2", 2, {}), ("zero3", 3, {}), ("pipeline", 2, {}),
        ("ddp", 2, {"compile": True}),
    ],
)  # fmt: skip
def test_every_strategy_stops(tmp_path: Path, strategy: str, ranks: int, keys: dict[str, Any]) -> None:
    def made(out: Path) -> dict[str, Any]:
        return plain(out, parallel={"strategy": strategy} | keys)

    assert ended(train, ranks, write(tmp_path, made(tmp_path / "whole"))) == [0] * ranks
    path = write(tmp_path, made(tmp_path / "out"))
    for place, count in (("step", 1), ("evaluate", 2)):
        assert ended(train_and_signal, ranks, path, place, count, ranks - 1, TERM) == [Exit.STOPPED] * ranks
        assert run_checkpoint(["verify", str(tmp_path / "out")]) == 0
    assert ended(train, ranks, path) == [0] * ranks
    same_end(tmp_path / "out", tmp_path / "whole")


@pytest.mark.long
def test_a_signal_while_the_others_are_waited_for(tmp_path: Path) -> None:
    """A rank whose peers do not come is in torch's own code, and has nothing to save."""
    path = write(tmp_path, plain(tmp_path / "out"))
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(port := free_port())
    process = subprocess.Popen(
        [sys.executable, "launch/train.py", path], cwd=ROOT, env=os.environ | variables, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not listening_at(port) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(TERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == Exit.STOPPED and "stopped by SIGTERM before the run began" in said


def listening_at(port: int) -> bool:
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def test_a_signal_to_save_does_not_stop(tmp_path: Path) -> None:
    out = tmp_path / "out"
    path = write(tmp_path, plain(out))
    assert ended(train_and_signal, 2, path, "evaluate", 2, 1, signal.SIGUSR2) == [0, 0]
    assert 4 in checkpoint.steps_in(out) and checkpoint.steps_in(out)[0] == STEPS


@pytest.mark.long
def test_stopped_at_random_moments(tmp_path: Path) -> None:
    """Anywhere in a program that imports and loads for seconds and trains for some more; then it is run to its end."""
    moments, ranks, rng, out = 50, 2, random.Random(50), tmp_path / "out"
    made = plain(out, train={"steps": 60 * moments, "eval_every": 7})
    path, slowest, done = write(tmp_path, made), 0.0, False
    for number in range(moments):
        before, begun = checkpoint.steps_in(out) if out.exists() else [], starts(out)
        processes = start_programs(path, ranks)
        try:
            asked = processes
            if number % 2:  # once the ranks have met a signal to one of them is enough
                while starts(out) == begun and processes[0].poll() is None:
                    time.sleep(0.01)
                asked = [rng.choice(processes)]
                time.sleep(rng.random() * 3)
            else:
                time.sleep(0.2 + rng.random() * 10)
            for process in asked:
                process.send_signal(rng.choice([TERM, USR1]))
            since = time.monotonic()
            codes = [process.wait(60) for process in processes]
            slowest = max(slowest, time.monotonic() - since)
        finally:
            for process in processes:
                process.kill()
        done = checkpoint.steps_in(out)[:1] == [60 * moments] if out.exists() else False
        assert codes == [Exit.STOPPED] * ranks, (number, codes)
        if out.exists() and checkpoint.steps_in(out):
            assert run_checkpoint(["verify", str(out)]) == 0 and checkpoint.steps_in(out)[0] >= max(before, default=0)
    print(f"{moments} moments, at step {checkpoint.steps_in(out)[:1]}, slowest {slowest:.1f} s, done {done}")
    assert slowest < 20 and not done  # ten seconds, where several programs of the tests do not share two cores


def starts(out: Path) -> int:
    """How often the ranks have met."""
    path = out / "starts.jsonl"
    return path.read_text().count('"start"') if path.exists() else 0


def start_programs(path: str, ranks: int) -> list[subprocess.Popen[bytes]]:
    """``launch/train.py`` on each rank, as a launcher starts it but for watching over it."""
    variables = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [
        subprocess.Popen(
            [sys.executable, "launch/train.py", path], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=os.environ | {name: str(value) for name, value in ({"RANK": rank, "LOCAL_RANK": rank} | variables).items()},
        )
        for rank in range(ranks)
    ]  # fmt: skip
