"""What a user sees while a run goes on: facts and the time left, in a terminal and without one."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

import bigvision
from bigvision.config import load_config
from bigvision.models import training_flops
from bigvision.monitor import progress
from bigvision.monitor.progress import Display, Forecast, Pace, duration, facts_of
from bigvision.training.trainer import to_come
from tests.recipes import lines, recipe

LINE = {
    "loss": 0.51234, "images_per_second": 1234.4, "peak_memory": 12.34e9, "planned_memory": 14e9, "mfu": 0.412,
    "waiting": 0.034,
}  # fmt: skip


def test_facts() -> None:
    every = ["loss 0.5123", "accuracy 83.20%", "1234 images/s", "MFU 41%", "12.3 of 14.0 GB", "3% waiting for data"]
    assert facts_of(LINE, {"loss": 1.0, "top1": 0.832}) == every
    assert facts_of({"loss": 0.5, "peak_memory": 2e9, "waiting": 0.001}, {"loss": 1.0}) == ["loss 0.5000", "2.0 GB"]
    assert [duration(seconds) for seconds in (7.4, 754, 3723, 200000)] == ["0:07", "12:34", "1:02:03", "2 d 7:33"]


def test_the_time_left_has_the_evaluations_and_saves_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now, pace = [0.0], Pace()
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    forecast = Forecast(to_come=lambda step: (2, 3), evaluated=60)
    now[0] = 50.0  # compiled
    pace.step()
    assert pace.left(1, 11, 10, forecast) is None
    for _ in range(4):
        now[0] += 2.0
        pace.step()
    assert pace.left(5, 11, 10, forecast) == pytest.approx(6 * 2.0 + 2 * 60 * 2.0 / 10 / 3), "an evaluation is estimated"
    now[0] += 30.0
    pace.pause("evaluation", 25.0)
    pace.pause("save", 5.0)
    now[0] += 2.0
    pace.step()
    assert pace.left(6, 11, 10, forecast) == pytest.approx(5 * 2.0 + 2 * 25.0 + 3 * 5.0)


@pytest.mark.parametrize("length", [7, 24, 53, 240])
def test_evaluations_and_saves_to_come_are_those_of_the_loop(length: int) -> None:
    steps, batch, began = 23, 24, 13
    for eval_every, every, minutes in ((None, None, None), (4, None, 5.0), (23, 5, None), (None, 100, None)):
        plain = {
            "train": {"global_batch": batch, "eval_every": eval_every}, "checkpoint": {"every": every, "minutes": minutes},
        }  # fmt: skip
        config = load_config(plain)
        for step in range(steps + 1):
            evaluations = saves = 0
            for later in range(step + 1, steps + 1):
                samples = began + later * batch
                epoch_ended = samples // length > (samples - batch) // length
                evaluations += later == steps or (epoch_ended if eval_every is None else later % eval_every == 0)
                by_epoch = epoch_ended and minutes is None
                saves += later == steps or (by_epoch if every is None else later % every == 0)
            found = to_come(step, config=config, steps=steps, samples=began + steps * batch, length=length)
            assert found == (evaluations, saves), (step, plain)


def test_a_bar_in_a_terminal_and_lines_without(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(LINE, {"top1": 0.832})
    for width, shown, hidden in ((180, "3% waiting for data", "@"), (100, "accuracy 83.20%", "MFU")):
        text = io.StringIO()
        display = Display(Console(file=text, force_terminal=True, width=width, highlight=False, color_system=None), True)
        display.begin(0, 100, [])
        display.step(40, 100, facts, 754.0)
        for _ in display.batches("evaluation", range(3), 3):
            display.bar.refresh()
        display.close()
        assert "40/100" in text.getvalue() and shown in text.getvalue() and hidden not in text.getvalue()
        assert re.search(r"12:3\d left", text.getvalue()) and "evaluation 2/3" in text.getvalue()
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    display = Display(Console(file=text, width=80, highlight=False, soft_wrap=True), True)
    display.begin(0, 100, [])
    for step in range(1, 101):
        now[0] += 1.0
        display.step(step, 100, ["loss 0.5000"], 100.0 - step)
    for _ in display.batches("evaluation", range(40), 40):
        now[0] += 2.0
    assert text.getvalue().splitlines() == [
        *(f"step {step}/100  loss 0.5000  {duration(100 - step)} left" for step in (6, 36, 66, 96)),
        "evaluation 13/40 batches  0:54 left",
        "evaluation 28/40 batches  0:24 left",
    ]


def test_a_run_shows_its_progress_unless_it_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal, of a device that has a datasheet and a plan; and the evaluation of its checkpoint."""
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    (tmp_path / "plan.json").write_text(json.dumps({"memory": {"peak": 10**9}}))
    plain = recipe(tmp_path, "small", train={"steps": 4, "eval_every": 2}, monitor={"every": 2, "progress": True})
    with (
        patch("bigvision.training.build.peak_flops", lambda *_: 1e12),
        patch("bigvision.training.trainer.peak_flops", lambda *_: 1e12),
    ):
        result = bigvision.train(plain)
    said = capsys.readouterr().out
    assert re.search(r"^step 3/4  loss \S+  accuracy \S+  \d+ images/s  MFU \d+%  \S+ GB.*  0:0\d left$", said, re.M), said
    assert len(re.findall(r"^evaluation 1/\d+ batches  0:0\d left$", said, re.M)) == 2, said
    records = [line for line in result.history if "loss" in line]
    with torch.device("meta"):
        net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **plain["model"]["options"])
    flops = training_flops(net, (3, 32, 32))
    assert flops and [line["mfu"] for line in records] == pytest.approx(
        [flops * line["images_per_second"] / 1e12 for line in records], abs=1e-4
    )
    assert all(0 <= line["waiting"] <= 1 for line in records) and "planned_memory" not in records[0], "of CUDA alone"
    evaluations = [line for line in lines(tmp_path) if "val_loss" in line]
    assert all(line["seconds"] > 0 and line["time"] > 1e9 for line in evaluations)

    from bigvision.launchers.evaluate import run

    run([str(result.checkpoint)], lambda line: None)
    said = capsys.readouterr()
    assert "evaluation 1/" in said.err and not said.out
    plain["monitor"]["progress"] = False
    bigvision.train(plain | {"out": str(tmp_path / "silent")})
    run([str(result.checkpoint), "--monitor.progress", "false"], lambda line: None)
    said = capsys.readouterr()
    assert "left" not in said.out + said.err and "images/s" not in said.out


def test_flops_are_those_of_the_passes() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5, bias=False), nn.ReLU(), nn.Linear(5, 7, bias=False))
    first, second = 2 * 12 * 5, 2 * 5 * 7
    assert training_flops(model, (3, 2, 2)) == 2 * first + 3 * second, "nobody wants the gradient of images"
    next(model[1].parameters()).requires_grad = False
    assert training_flops(model, (3, 2, 2)) == first + 2 * second
    assert training_flops(nn.Linear(3, 3, device="meta"), (3, 2, 2)) is None
