"""Losses that stand out are said, and with a rollback their batch is passed over."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import bigvision
from bigvision import checkpoint, load_config
from bigvision.training.numbers import LEAST, WINDOW, Spikes
from tests.distributed import run_ranks, start_ranks
from tests.recipes import digests, lines, losses, recipe
from tests.training.planted import planted, run_planted, run_without, scalars


def noise(count: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(2.0, 0.1) for _ in range(count)]


def test_no_verdict_before_there_are_enough_losses() -> None:
    spikes = Spikes(6.0)
    assert [spikes.look(loss) for loss in noise(LEAST - 1)] == [None] * (LEAST - 1)
    assert spikes.look(50.0) is None, "one of the first is a loss as any other"
    spikes = Spikes(6.0)
    assert [spikes.look(loss) for loss in noise(LEAST)] == [None] * LEAST
    spike = spikes.look(4.0)
    assert spike is not None and spike.deviations > 6 and spike.mean == pytest.approx(2.0, abs=0.1)


def test_a_spike_does_not_hide_the_next() -> None:
    spikes = Spikes(6.0)
    assert not any(spikes.look(loss) for loss in noise(300))
    assert len(spikes.losses) == WINDOW
    assert spikes.look(9.0) and spikes.look(3.5) and not spikes.look(2.1) and not spikes.look(0.1)


def test_equal_losses_and_their_last_digit() -> None:
    spikes = Spikes(6.0)
    assert not any(spikes.look(2.0) for _ in range(50))
    assert not spikes.look(2.0 + 1e-9) and spikes.look(2.1)


def test_a_level_that_lasts_is_no_spike() -> None:
    spikes = Spikes(6.0)
    [spikes.look(loss) for loss in noise(50)]
    found = [bool(spikes.look(loss + 3)) for loss in noise(60, seed=1)]
    assert found == [True] * LEAST + [False] * (60 - LEAST)


def test_a_restarted_run_judges_as_one_that_went_on() -> None:
    values = noise(150) + [4.0] * 3 + noise(20, seed=1)
    whole = Spikes(6.0)
    expected = [whole.look(loss) for loss in values]
    for cut in (10, 130, 152):
        first = Spikes(6.0)
        [first.look(loss) for loss in values[:cut]]
        losses, in_a_row = json.loads(json.dumps([list(first.losses), first.in_a_row]))
        second = Spikes(6.0, losses)
        second.in_a_row = in_a_row
        assert [second.look(loss) for loss in values[cut:]] == expected[cut:]


AT, STEPS = 22, 27
"""Batches before the spike, and steps in all."""
LAYOUTS: list[Any] = [("fsdp", 3, "vit", {"strategy": "fsdp"})]
LONG = [
    ("pipeline", 2, "vit", {"strategy": "pipeline"}),
    ("ddp", 3, "resnet", {"strategy": "ddp"}),
    ("zero3", 2, "vit", {"strategy": "zero3"}),
    ("zero2", 3, "resnet", {"strategy": "zero2"}),
    ("hybrid", 4, "vit", {"strategy": "fsdp", "replicas": 2, "precision": "bf16"}),
    ("offload", 2, "vit", {"strategy": "zero2", "offload": "optimizer"}),
    ("pipeline4", 4, "vit", {"strategy": "pipeline", "stages": 2}),
]


def plain(out: Path, model: str = "vit", every: int = 10, **sections: Any) -> dict[str, Any]:
    faults = {"spike": 20.0, "rollback": True} | sections.pop("faults", {})
    train = {"steps": STEPS, "micro_batch": None, "global_batch": 12}
    return recipe(out, model, faults=faults, train=train, checkpoint={"every": every, "keep": 9}, **sections)


def same(one: Path, other: Path, step: int = STEPS) -> None:
    assert digests(one / f"step-{step:08}") == digests(other / f"step-{step:08}")
    assert scalars(one / f"step-{step:08}") == scalars(other / f"step-{step:08}")
    assert losses(one) == losses(other)


@pytest.mark.parametrize(
    ("name", "ranks", "model", "parallel"), [*LAYOUTS, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_a_batch_that_made_a_spike_was_never_there(
    tmp_path: Path, name: str, ranks: int, model: str, parallel: dict[str, Any]
) -> None:
    data = {"workers": 1} if name == "fsdp" else {}
    found = run_ranks(run_planted, ranks, plain(tmp_path / "spike", model, parallel=parallel, data=data), "spike", [AT], None)
    run_ranks(run_without, ranks, plain(tmp_path / "without", model, parallel=parallel), [AT])
    assert found == [(ids, "") for ids, _ in found] and all(len(ids) == 1 for ids, _ in found), "it is trained on once"
    same(tmp_path / "spike", tmp_path / "without")
    told = lines(tmp_path / "spike")
    back = [line["rolled_back"] for line in told if "rolled_back" in line]
    assert [(event["from_step"], event["passes_over"]) for event in back] == [(AT + 1, AT * 12)] and back[0]["loss"] > 10
    assert [line["step"] for line in told if "loss" in line] == list(range(1, STEPS + 1))


def test_a_spike_is_said(tmp_path: Path) -> None:
    made = plain(tmp_path, faults={"rollback": False}, monitor={"every": 10})
    run_ranks(run_planted, 2, made, "spike", [AT], None)
    told = [line for line in lines(tmp_path) if "spike" in line]
    assert [line["step"] for line in told] == [AT + 1]
    assert told[0]["spike"]["loss"] > 10 > told[0]["spike"]["mean"] and told[0]["spike"]["deviations"] > 20
    assert checkpoint.steps_in(tmp_path) == [27, 20, 10]


def test_the_checkpoint_of_a_spike_is_not_saved_and_the_beginning_is(tmp_path: Path) -> None:
    """The spike comes at a step that is to be saved, before any other was."""
    every = {"every": AT + 1}
    run_ranks(run_planted, 2, plain(tmp_path / "spike", **every), "spike", [AT], None)
    run_ranks(run_without, 2, plain(tmp_path / "without", **every), [AT])
    same(tmp_path / "spike", tmp_path / "without")
    same(tmp_path / "spike", tmp_path / "without", 0)
    progress = json.loads((tmp_path / "spike" / f"step-{AT + 1:08}" / "progress.json").read_text())
    assert progress["faults"]["passed_over"] == [[AT * 12, 12]]


@pytest.mark.parametrize("stops", [AT, AT - 2])
def test_a_callback_ends_a_run_in_the_read_that_goes_back(tmp_path: Path, stops: int) -> None:
    """The step before the spike is read with it, at an epoch's end. STOP comes there, or all ranks hear of it there."""
    made = plain(tmp_path, "small", every=8, monitor={"every": 1})
    asked: list[int] = []

    def until(event: bigvision.Event) -> object:
        if event.kind != "step" or event.step < stops or asked:
            return None
        asked.append(event.step)
        return bigvision.STOP

    with planted("spike", [AT], None):
        result = bigvision.train(load_config(made), callbacks=[until])
    assert asked == [stops] and result.reason == "the callback until returned STOP"
    told = lines(tmp_path)
    (back,) = [at for at, line in enumerate(told) if "rolled_back" in line]
    evaluated = [line["step"] for line in told[back:] if "val_loss" in line]
    assert evaluated == [result.step] and checkpoint.steps_in(tmp_path)[0] == result.step < AT, "evaluated and saved once"
    progress = json.loads((tmp_path / f"step-{result.step:08}" / "progress.json").read_text())
    assert progress["faults"]["passed_over"] == [[AT * 12, 12]] and progress["evaluated"] == result.step


def run_until(made: dict[str, Any], passes: int, step: int) -> None:
    """Train, and be killed when the batch of *step* comes for the time number *passes*."""
    from bigvision.engine import Engine

    train_step, seen = Engine.train_step, []

    def killed(self: Any, batch: Any) -> Any:
        seen.append(self.step)
        if seen.count(step) == passes:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, batch)

    with patch.object(Engine, "train_step", killed):
        run_planted(made, "spike", [AT], None)


@pytest.mark.long
def test_a_run_killed_after_the_rollback_passes_over_it_all_the_same(tmp_path: Path) -> None:
    made = plain(tmp_path / "killed", parallel={"strategy": "fsdp"})
    processes = start_ranks(run_until, 2, made, 2, AT - 1)
    for process in processes:
        process.join(200)
    assert {process.exitcode for process in processes} == {-signal.SIGKILL}
    assert checkpoint.steps_in(tmp_path / "killed") == [20, 10, 0]
    assert run_ranks(run_planted, 2, made, "spike", [AT], None) == [([], "")] * 2, "not trained on again"
    run_ranks(run_without, 2, plain(tmp_path / "without", parallel={"strategy": "fsdp"}), [AT])
    same(tmp_path / "killed", tmp_path / "without")


@pytest.mark.long
def test_with_another_global_batch_what_overlaps_is_passed_over(tmp_path: Path) -> None:
    made = plain(tmp_path)
    run_ranks(run_planted, 1, made | {"train": made["train"] | {"steps": 24}}, "spike", [AT], None)
    # Samples 264..275 are passed over; from 240 on, batches of 16 begin with 240, 256, 272.
    other = made["train"] | {"global_batch": 16, "steps": 24}
    run_ranks(run_planted, 1, made | {"train": other, "checkpoint": made["checkpoint"] | {"resume": "20"}}, "none", [], None)
    assert [line["step"] for line in lines(tmp_path) if line.get("skipped")] == [22, 23]


@pytest.mark.long
def test_too_many_spikes_end_the_run(tmp_path: Path) -> None:
    found = run_ranks(run_planted, 2, plain(tmp_path), "spike", [20, 21, 23, 24], None)
    assert all("step 25: a spike, as in 3 batches before it since step-00000020" in error for _, error in found), found
    assert checkpoint.steps_in(tmp_path) == [20, 10, 0]


@pytest.mark.long
def test_spikes_apart_are_each_gone_back_from(tmp_path: Path) -> None:
    bad = [20, 21, 22, 25, 26]
    found = run_ranks(run_planted, 1, plain(tmp_path / "spike", every=5), "spike", bad, None)
    assert found[0][1] == ""
    run_ranks(run_without, 1, plain(tmp_path / "without", every=5), bad)
    same(tmp_path / "spike", tmp_path / "without")
