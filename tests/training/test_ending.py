"""A run that ends before its last step: a callback returns STOP, or patience is exhausted; on all ranks alike."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bigvision
from bigvision import checkpoint
from bigvision.config import load_config
from bigvision.training.callbacks import Patience
from tests.distributed import run_ranks
from tests.recipes import digests, lines, recipe

STEPS = 12
AT = 4


def plain(out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    usual: dict[str, Any] = {"train": {"steps": STEPS, "eval_every": 4}, "checkpoint": {"every": 4, "keep": 99}}
    return recipe(out, "small", **{name: usual.get(name, {}) | keys for name, keys in (usual | sections).items()})


def ended(plain: dict[str, Any], kind: str = "", at: int = AT, crash: int | None = None) -> tuple[int, str]:
    """Train on this rank; a callback returns STOP with an event *kind* at step *at* or later, or crashes at a step."""

    def until(event: bigvision.Event) -> object:
        if event.kind == "step" and event.step == crash:
            raise ZeroDivisionError
        return bigvision.STOP if event.kind == kind and event.step >= at else event  # anything else means nothing

    result = bigvision.train(load_config(plain), callbacks=[until])
    return result.step, result.reason


def progress_of(out: Path, step: int) -> dict[str, Any]:
    return json.loads((out / checkpoint.folder_name(step) / "progress.json").read_text())


@pytest.mark.parametrize(
    ("kind", "ranks"), [("step", 2), ("evaluation", 2), pytest.param("checkpoint", 1, marks=pytest.mark.long)]
)
def test_a_callback_ends_a_run_well_on_all_ranks_at_the_same_step(tmp_path: Path, kind: str, ranks: int) -> None:
    out = tmp_path / "out"
    ((step, reason),) = set(run_ranks(ended, ranks, plain(out), kind, 5 if kind == "step" else AT))
    assert reason == "the callback until returned STOP"
    assert 5 < step <= 8 if kind == "step" else AT <= step <= AT + (3 if kind == "checkpoint" else 0)
    progress = progress_of(out, step)
    evaluated = [line for line in lines(out) if "val_loss" in line]
    assert progress["evaluated"] == step == evaluated[-1]["step"] and progress["metrics"]["loss"] == evaluated[-1]["val_loss"]
    assert [line["step"] for line in evaluated] == sorted({4, step}), "no evaluation twice"
    if kind == "step":
        # The same command goes on from there, to the bits of a run that was never ended.
        assert set(run_ranks(ended, ranks, plain(out))) == {(STEPS, "")}
        run_ranks(ended, ranks, plain(tmp_path / "whole"))
        last = checkpoint.folder_name(STEPS)
        assert digests(out / last) == digests(tmp_path / "whole" / last)


def test_patience_ends_a_run_and_a_restart_comes_to_the_same_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is learned, so that the first evaluation stays the best. One run crashes between two of them."""
    train = {"steps": 40, "eval_every": 2, "patience": 3, "patience_metric": "loss"}
    whole, broken = (
        plain(tmp_path / name, train=train, optim={"lr": 0.0}, checkpoint={"every": 5}) for name in ("whole", "broken")
    )
    ends = run_ranks(ended, 2, whole)
    assert len(set(ends)) == 1 and ends[0][0] == 8, "the evaluation of step 2 and three more"
    assert "loss was best at step 2" in ends[0][1]
    with pytest.raises(ZeroDivisionError):
        ended(broken, crash=7)
    assert ended(broken) == ends[0]
    known = [progress_of(tmp_path / name, 8)["patience"] for name in ("whole", "broken")]
    assert known[0] == {"metric": "loss", "best": pytest.approx(known[1]["best"]), "best_step": 2, "without": 3}
    assert known[1]["without"] == 3
    capsys.readouterr()
    assert ended(broken) == ends[0], "started again, it does not train on"
    assert "ended at step 8 of 40: train.patience: 3: loss was best at step 2" in capsys.readouterr().out
    broken["train"] |= {"patience": 4, "steps": 12}
    assert ended(broken)[0] == 10, "one more evaluation"


def test_patience_knows_which_values_are_better() -> None:
    config = load_config({"train": {"patience": 2}, "checkpoint": {"keep_best": "top5"}})
    names = ("loss", "top1", "top5", "ema_loss", "ema_top1")
    assert Patience(config, names).metric == "top5"
    config = replace(config, checkpoint=replace(config.checkpoint, keep_best=None))
    assert Patience(config, names).metric == "top1" and Patience(config, ("loss", "ema_loss")).metric == "loss"
    for metric, values in (("top1", (0.1, 0.3, math.nan, 0.3)), ("ema_loss", (3.0, 1.0, math.inf, 1.0))):
        patience = Patience(replace(config, train=replace(config.train, patience_metric=metric)), names)
        for step, value in enumerate(values):
            assert patience.why() == ""
            patience.take(step, {metric: value})
        assert (patience.best_step, patience.without) == (1, 2) and f"{metric} was best at step 1" in patience.why()
        other = Patience(config, ("loss", "map"))
        other.restore(patience.state())
        assert other.without == 0, "of another metric"


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"patience_metric": "top1"}, r"train\.patience_metric: top1 needs train\.patience"),
        ({"patience": 0}, r"train\.patience: 0 must be a finite number from 1 on"),
        ({"patience": 2, "patience_metric": "map"}, r"train\.patience_metric: map is no metric of this run: use loss, top1"),
    ],
)
def test_mistakes(tmp_path: Path, train: dict[str, Any], said: str) -> None:
    with pytest.raises(bigvision.UserError, match=said):
        ended(plain(tmp_path, train=train))
