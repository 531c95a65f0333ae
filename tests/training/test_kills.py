"""Each task and each kind of fine-tuning, killed in the middle of a step and of a save, ends with the bits of a run left alone.

`embed` has no runs that could be killed: it learns nothing (see `bigvision.tasks.embed`). Kills at random moments, with worker
processes and with EMA, are in test_resume.py; kills at each system call of a save in tests/checkpoint/test_crashes.py.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.distributed import run_ranks, start_ranks
from tests.engine.test_optimizers import RATES
from tests.engine.test_parts import CASES as PARTS
from tests.recipes import digests, lines, recipe, run
from tests.tasks.scenes import Scenes
from tests.tasks.test_own import Weighed
from tests.tasks.test_strategies import ROWS, STEPS, STRATEGIES, plain

EVERY, MOMENTS = 4, ("step", "save")
"""Steps between checkpoints, and where a run of 10 is killed: within step 7, then while the checkpoint of step 8 is written."""
DEADLINE = 120
"""Seconds until a rank has to get somewhere; generous, for the machine may be busy."""

Case = tuple[str, str]
"""What is trained (a task, a case of test_parts.py, or an optimizer), and a layout of `STRATEGIES`."""
TASKS: list[Case] = [
    (name, layout)
    for name in (*ROWS, "own")
    for layout, (_, parallel) in STRATEGIES.items()
    if name == "own" or parallel["strategy"] not in ROWS[name].refused
]
OTHERS: list[Case] = [
    ("lora", "fsdp 3"), ("lora", "zero3 2"), ("last", "pipeline 2"), ("bf16", "zero2 2"), ("groups", "hybrid 2x2"),
    ("sgd", "fsdp 2"), ("lion", "zero2 2"), ("lamb", "fsdp 3"), ("adafactor", "ddp 1"), ("muon", "hybrid 2x2"),
    ("muon", "pipeline 2"),
]  # fmt: skip
SHORT: Case = ("regress", "fsdp 2")


def configuration(out: Path, name: str, layout: str) -> dict[str, Any]:
    sections = {"train": {"eval_every": 3}, "checkpoint": {"every": EVERY}}
    parallel = STRATEGIES[layout][1]
    if name in ROWS:
        return plain(out, name, parallel, **sections)
    sections["train"]["steps"] = STEPS
    made = recipe(out, "vit" if name in PARTS else "small", parallel=parallel, **sections)
    more: dict[str, dict[str, Any]] = PARTS.get(name, {})
    if name in RATES:
        more = {"optim": {"name": name, "lr": RATES[name]}}
    return made | {section: made[section] | keys for section, keys in more.items()}


def train(config: dict[str, Any], name: str, moment: str = "") -> None:
    """Train on this rank, and note the samples of each step. At the *moment* one rank leaves a file, and goes no further."""
    from bigvision import disk
    from bigvision.engine import Engine

    out, rank, last = Path(config["out"]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
    trained, loss, publish = Engine.train_step, Engine._loss, disk.publish
    losses = []

    def wait_for_the_kill() -> None:
        while not (out / "step-00000004").exists():
            time.sleep(0.01)  # it is written in the background
        (out / moment).touch()
        time.sleep(2 * DEADLINE)

    def train_step(self: Any, batch: Any) -> Any:
        result = trained(self, batch)
        with (out / f"ids-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.step, batch.ids.tolist()]) + "\n")
        return result

    def counted_loss(self: Any, *args: Any) -> Any:
        losses.append(self.step)
        if moment == "step" and rank == last and losses.count(6) == 2:  # the last rank: others of a pipeline compute no loss
            wait_for_the_kill()
        return loss(self, *args)

    def publish_step(unfinished: Path, final: Path) -> None:
        if moment == "save" and final.name == "step-00000008":
            wait_for_the_kill()
        publish(unfinished, final)

    given: dict[str, Any] = {"task": Weighed()} if name == "own" else {}
    if name in ROWS:
        target = ROWS[name].target
        given = {"data": Scenes(64, target), "val": Scenes(53, target, seed=1)}
    with (
        mock.patch.object(Engine, "train_step", train_step),
        mock.patch.object(Engine, "_loss", counted_loss),
        mock.patch.object(disk, "publish", publish_step),
    ):
        run(config, **given)


def killed_at(moment: str, config: dict[str, Any], name: str, ranks: int) -> list[int | None]:
    """Start the run, kill all ranks when one is at the *moment*, and return their exit codes."""
    processes = start_ranks(train, ranks, config, name, moment)
    there, deadline = Path(config["out"]) / moment, time.monotonic() + DEADLINE
    while not there.exists() and time.monotonic() < deadline and all(process.exitcode is None for process in processes):
        time.sleep(0.01)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(
    ("name", "layout"),
    [pytest.param(*case, marks=[] if case == SHORT else [pytest.mark.long], id=", ".join(case)) for case in TASKS + OTHERS],
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, name: str, layout: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ranks = STRATEGIES[layout][0]
    for out in (whole, killed):
        out.mkdir()
    run_ranks(train, ranks, configuration(whole, name, layout), name)
    config = configuration(killed, name, layout)
    for moment in MOMENTS:
        assert killed_at(moment, config, name, ranks) == [-signal.SIGKILL] * ranks and (killed / moment).exists()
        assert (killed / "step-00000004").exists() and not (killed / "step-00000008").exists()
    for process in (processes := start_ranks(train, ranks, config, name)):
        process.join(DEADLINE)
    assert [process.exitcode for process in processes] == [0] * ranks

    numbers = [[_numbers(line) for line in lines(out)] for out in (whole, killed)]
    assert numbers[0] == numbers[1] and {line["step"] for line in numbers[0] if "val_loss" in line} == {3, 6, 9, 10}
    assert [line["step"] for line in numbers[0] if "loss" in line] == list(range(1, STEPS + 1))
    for step in (f"step-{step:08}" for step in (4, 8, 10)):
        assert digests(killed / step) == digests(whole / step)
    for rank in range(ranks):
        expected, seen = (_ids(out, rank) for out in (whole, killed))
        assert [step for step, _ in expected] == list(range(1, STEPS + 1)) and all(entry in expected for entry in seen)
        assert len(seen) > len(expected), "nothing was repeated"


def _numbers(line: dict[str, Any]) -> dict[str, Any]:
    """Of a line of the log what is not a time or a speed."""
    return {key: value for key, value in line.items() if key in ("step", "loss", "lr", "grad_norm") or key.startswith("val_")}


def _ids(out: Path, rank: int) -> list[tuple[int, list[int]]]:
    return [tuple(json.loads(line)) for line in (out / f"ids-{rank}.jsonl").read_text().splitlines()]
