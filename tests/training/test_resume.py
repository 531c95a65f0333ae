"""Stopping, killing and going on, under the same and under another strategy."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks, start_ranks
from tests.recipes import digests, lines, losses, recipe, run

LAYOUTS = {"ddp1": ("ddp", 1, 1), "fsdp2": ("fsdp", 2, 1), "fsdp3": ("fsdp", 3, 1), "fsdp2x2": ("fsdp", 4, 2)}


PAIR = ("ddp1", "fsdp3")
ALL = [pytest.param(model, tuple(LAYOUTS), marks=pytest.mark.long) for model in ("convnext", "resnet")]


@pytest.mark.parametrize(("model", "layouts"), [("resnet", PAIR), *ALL])
def test_every_strategy_resumes_every_other_and_writes_the_same_bytes(
    tmp_path: Path, model: str, layouts: tuple[str, ...]
) -> None:
    """Odd shapes, BatchNorm's buffers, and files so small that there are many."""

    def plain(out: Path, layout: str, steps: int, **checkpoint: Any) -> dict[str, Any]:
        strategy, _, replicas = LAYOUTS[layout]
        return recipe(
            out, model, parallel={"strategy": strategy, "replicas": replicas}, checkpoint={"shard_size": "40kB", **checkpoint},
            train={"steps": steps, "micro_batch": None}, optim={"schedule": "constant"},
        )  # fmt: skip

    for first in layouts:
        run_ranks(run, LAYOUTS[first][1], plain(tmp_path / first, first, 4))
        saved = tmp_path / first / "step-00000004"
        written = digests(saved)
        assert sum(name.startswith("model-") for name in written) > 3 and "model.safetensors.index.json" in written
        for second in layouts:
            out = tmp_path / f"{first}-{second}"
            run_ranks(run, LAYOUTS[second][1], plain(out, second, 4, resume=str(saved)))
            assert digests(out / "step-00000004") == written, f"{first} resumed as {second}"
            assert losses(out) == []
    if model == "convnext":  # BatchNorm's batches differ with the number of ranks, and so do its losses
        run_ranks(run, 1, plain(tmp_path / "whole", "ddp1", 9))
        for first in ("ddp1", "fsdp3"):
            for second, (_, other_ranks, _) in LAYOUTS.items():
                out = tmp_path / f"{first}-{second}-on"
                saved = tmp_path / first / "step-00000004"
                run_ranks(run, other_ranks, plain(out, second, 9, resume=str(saved)))
                assert losses(out) == pytest.approx(losses(tmp_path / "whole")[4:], rel=1e-5)


def run_with_trace(plain: dict[str, Any]) -> None:
    """As :func:`run`, and note the sample ids of every step."""
    from bigvision.engine import Engine

    step = Engine.train_step
    path = Path(plain["out"]) / f"ids-{os.environ['RANK']}.jsonl"

    def traced(self: Any, batch: Any) -> Any:
        with path.open("a") as file:
            file.write(json.dumps([self.step, batch.ids.tolist()]) + "\n")
        return step(self, batch)

    Engine.train_step = traced  # type: ignore[method-assign]
    run(plain)


KILLED = [("fsdp", 3, 1, 0), ("fsdp", 3, 1, 2), ("fsdp", 4, 2, 0), ("ddp", 3, 1, 0), ("ddp", 2, 1, 2)]
KILLED += [("zero2", 3, 1, 0), ("zero3", 2, 1, 2)]
AVERAGED = [("fsdp", 2, 1, 1)]


@pytest.mark.long
@pytest.mark.parametrize(("strategy", "ranks", "replicas", "workers"), KILLED + AVERAGED)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, strategy: str, ranks: int, replicas: int, workers: int) -> None:
    """SIGKILL of all ranks at random moments, in the middle of epochs; dropout and drop path on."""
    rng = random.Random(f"{strategy}{ranks}{workers}")
    steps = 30

    def plain(out: Path) -> dict[str, Any]:
        made = recipe(
            out, parallel={"strategy": strategy, "replicas": replicas}, train={"steps": steps}, checkpoint={"every": 4},
            data={"workers": workers, "train": "digits", "val": "digits"}, task={"label_smoothing": 0.1},
        )  # fmt: skip
        if (strategy, ranks, replicas, workers) in AVERAGED:
            made["ema"] = {"decay": 0.9}
        made["model"] = made["model"] | {"drop_path": 0.2, "options": made["model"]["options"] | {"proj_drop_rate": 0.1}}
        return made

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    for process in (processes := start_ranks(run_with_trace, ranks, plain(tmp_path / "whole"))):
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * ranks

    out, kills = tmp_path / "killed", 0
    for target in (2, 7, 18, 26):
        processes = start_ranks(run_with_trace, ranks, plain(out))
        deadline = time.monotonic() + 120
        while _lines_so_far(out) < target and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.1)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
        for process in processes:
            process.join()
        kills += any(process.exitcode == -signal.SIGKILL for process in processes)
    for process in (processes := start_ranks(run_with_trace, ranks, plain(out))):
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * ranks and kills >= 3

    assert losses(out) == losses(tmp_path / "whole")
    assert [line["step"] for line in lines(out) if "loss" in line] == list(range(1, steps + 1))
    written = digests(out / "step-00000030")
    assert written == digests(tmp_path / "whole" / "step-00000030")
    assert ("ema.safetensors" in written) == ((strategy, ranks, replicas, workers) in AVERAGED)
    for rank in range(ranks):
        expected = dict(_ids(tmp_path / "whole", rank))
        seen = _ids(out, rank)
        assert len(expected) == steps and {step for step, _ in seen} == set(expected)
        assert all(ids == expected[step] for step, ids in seen)
        assert len(seen) > steps, "nothing was repeated, so nothing was killed between two checkpoints"


def _lines_so_far(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def _ids(out: Path, rank: int) -> list[tuple[int, list[int]]]:
    found = []
    for line in (out / f"ids-{rank}.jsonl").read_text().splitlines():
        try:
            found.append(tuple(json.loads(line)))
        except ValueError:
            continue  # cut by the kill
    return found


def run_and_listen(plain: dict[str, Any]) -> tuple[list[float], str]:
    """As :func:`run`, with what the rank printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return run(plain), said.getvalue()


def test_a_damaged_checkpoint_is_passed_over_aloud(tmp_path: Path) -> None:
    plain = recipe(tmp_path, train={"steps": 6}, checkpoint={"every": 2})
    whole = run_ranks(run, 2, plain)[0]
    victim = tmp_path / "step-00000006" / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(bytes(data))
    (again, said), (_, other_said) = run_ranks(run_and_listen, 2, plain)
    assert again == whole and other_said == "", "only rank 0 prints"
    assert "step-00000006 is damaged (model.safetensors differs" in said
    assert "resuming from" in said and "step 4 of 6" in said
