"""When a run is saved, and from where one goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bigvision import checkpoint
from tests.cli.test_mistakes import refused
from tests.distributed import run_ranks, start_ranks
from tests.recipes import digests, losses, recipe, run, write_recipe
from tests.training.test_resume import run_and_listen


def ask_at(plain: dict[str, Any], step: int, rank: int) -> None:
    """Run, and send the signal to *rank* in the middle of *step*."""
    from bigvision.engine import Engine

    train_step = Engine.train_step

    def asked(self: Any, batch: Any) -> Any:
        if self.step == step and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGUSR2)
        return train_step(self, batch)

    Engine.train_step = asked  # type: ignore[method-assign]
    run(plain)


@pytest.mark.parametrize("background", [True, False])
def test_a_signal_to_any_rank_saves_at_that_step(tmp_path: Path, background: bool) -> None:
    plain = recipe(tmp_path, train={"steps": 9}, checkpoint={"every": 100, "background": background})
    processes = start_ranks(ask_at, 3, plain, 4, 2)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    last, asked = checkpoint.steps_in(tmp_path)
    assert last == 9 and 5 <= asked <= 8, "all ranks have heard of it within three further steps"


def test_saving_by_minutes(tmp_path: Path) -> None:
    run_ranks(run, 2, recipe(tmp_path / "often", train={"steps": 4}, checkpoint={"minutes": 1e-6, "keep": 9}))
    saved = checkpoint.steps_in(tmp_path / "often")
    assert saved[0] == 4 and len(saved) >= 3, "the ranks agree on a time within a step or two"
    run_ranks(run, 2, recipe(tmp_path / "rarely", train={"steps": 4}, checkpoint={"minutes": 60}))
    assert checkpoint.steps_in(tmp_path / "rarely") == [4]


def test_going_on_from_an_earlier_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    plain = recipe(out, train={"steps": 6}, checkpoint={"every": 2})
    run_ranks(run, 2, plain)
    whole, last = losses(out), digests(out / "step-00000006")
    (_, said), _ = run_ranks(run_and_listen, 2, plain | {"checkpoint": plain["checkpoint"] | {"resume": "2"}})
    assert "resuming from" in said and "step 2 of 6" in said
    assert "step-00000006 is later than step 2" in said and "step-00000004 is later" in said
    assert checkpoint.steps_in(out) == [6, 4, 2] and losses(out) == whole
    assert digests(out / "step-00000006") == last
    assert digests(next(out.glob("step-00000006.left-*"))) == last, "what was there is kept"
    refused(["train", write_recipe(tmp_path), "--checkpoint.resume", "3"], "no checkpoint of step 3", "6, 4, 2")


def test_the_best_is_kept(tmp_path: Path) -> None:
    plain = recipe(
        tmp_path, train={"steps": 6, "eval_every": 1}, checkpoint={"every": 1, "keep": 1, "keep_best": "loss"},
        optim={"schedule": "constant", "lr": 0.3, "warmup": 0},
    )  # fmt: skip
    run_ranks(run, 2, plain)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    values = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    best = min(values, key=lambda step: (values[step], step))
    assert checkpoint.steps_in(tmp_path) == sorted({6, best}, reverse=True) and best != 6
    refused(["train", write_recipe(tmp_path), "--checkpoint.keep_best", "mAP"], "checkpoint.keep_best: mAP", "loss, top1")


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    plain = recipe(tmp_path / "out", train={"steps": 100_000})
    processes = start_ranks(run, 2, plain)
    try:
        while not (tmp_path / "out" / "metrics.jsonl").exists() and processes[0].is_alive():
            processes[0].join(0.05)
        path = write_recipe(tmp_path)
        refused(["train", path], f"in use by process {processes[0].pid}", "--out")
    finally:
        for process in processes:
            process.kill()
            process.join()
