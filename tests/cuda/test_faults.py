"""Kill, stop, resume, a lack of memory and numbers that are not finite, on the device."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from tests.cuda.jobs import job, start_process
from tests.cuda.runs import STRATEGIES, installed, marks_of, on_cpu, peak_of, plain, synchronize
from tests.recipes import digests, lines, losses, recipe, run

# Killed without a chance to do anything, the run goes on from its last checkpoint.


def sections(strategy: str, precision: str, deterministic: bool = False) -> dict[str, Any]:
    """Fourteen steps with an average of the weights, saved at each fifth."""
    if deterministic:
        # cuBLAS reads it when CUDA starts, and the jobs train twice in a process.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    more = {"deterministic": True} if deterministic else {}
    return {
        "parallel": {"strategy": strategy, "precision": precision},
        "train": {"steps": 14, "micro_batch": 8, **more},
        "checkpoint": {"every": 5},
        "optim": {"lr": 5e-4},
        "ema": {"decay": 0.9},
    }


def run_until_killed(made: dict[str, Any], step: int) -> None:
    """Train, and end without a word at *step*, while the checkpoint of a step before may still be written."""
    from bigvision.config import load_config
    from bigvision.training import Event, train_on_rank

    def kill(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    train_on_rank(load_config(made), callbacks=[kill])


def killed(folder: Path, model: str, strategy: str, precision: str, deterministic: bool) -> dict[str, Any]:
    changed = sections(strategy, precision, deterministic)
    process = start_process(run_until_killed, plain(folder / "killed", model, **changed), 11)
    run(plain(folder / "whole", model, **changed))
    process.join(120)
    before = len(losses(folder / "killed"))
    run(plain(folder / "killed", model, **changed))
    starts = [json.loads(line) for line in (folder / "killed" / "starts.jsonl").read_text().splitlines()]
    whole, again = folder / "whole", folder / "killed"
    return {
        "code": process.exitcode,
        "steps before": before,
        "resumed at": [line["step"] for line in starts if "step" in line],
        "losses": (losses(whole), losses(again)),
        "files": (digests(whole / "step-00000014"), digests(again / "step-00000014")),
    }


KILLED = [
    ("vit", "fsdp", "bf16", False), ("vit", "ddp", "fp16", False), ("vit", "zero2", "bf16", False),
    ("vit", "ddp", "fp32", True), ("resnet", "fsdp", "bf16", True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "strategy", "precision", "deterministic"),
    [
        pytest.param(
            *case,
            marks=[
                job(killed, *case, seconds=40),
                *marks_of(case[1]),
            ],
        )
        for case in KILLED
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(
    results: Callable[..., Any], model: str, strategy: str, precision: str, deterministic: bool
) -> None:
    found = results(killed, model, strategy, precision, deterministic)
    assert found["code"] == -signal.SIGKILL and found["steps before"] >= 10
    assert found["resumed at"][0] == 0 and found["resumed at"][-1] in (5, 10)
    whole, again = found["losses"]
    assert len(whole) == 14 and again == whole
    assert found["files"][0] == found["files"][1]


def repeated(folder: Path, strategy: str, precision: str, deterministic: bool) -> bool:
    """Whether two undisturbed runs of a ViT have the same bytes."""
    names = ("one", "other")
    for name in names:
        run(plain(folder / name, **sections(strategy, precision, deterministic)))
    one, other = (digests(folder / name / "step-00000014") for name in names)
    assert one
    return one == other


REPEATED = [("ddp", "fp32"), ("fsdp", "fp32"), ("zero2", "bf16")]


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [pytest.param(*case, marks=[job(repeated, *case, True), *marks_of(case[0])]) for case in REPEATED],
)
def test_deterministic_runs_repeat(results: Callable[..., Any], strategy: str, precision: str) -> None:
    assert results(repeated, strategy, precision, True)


# A signal to stop.


def run_command(folder: str, steps: int) -> None:
    """The command, as a launcher starts it; ends with its exit code."""
    import sys

    from bigvision.cli import main

    made = plain(Path(folder) / "out", train={"steps": steps}, checkpoint={"every": 100_000})
    path = Path(folder) / "recipe.yaml"
    path.write_text(json.dumps(made))
    sys.exit(main(["train", str(path)]))


def stopped(folder: Path) -> tuple[int | None, int, int]:
    """Stop a run after its tenth step; returns its exit code, the step that it saved, and the last that it logged."""
    process = start_process(run_command, str(folder), 100_000)
    path = folder / "out" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < 10:
        assert time.monotonic() < until and process.exitcode is None, "no tenth step"
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    (saved,) = (int(path.name.removeprefix("step-")) for path in (folder / "out").glob("step-*"))
    return process.exitcode, saved, max(line["step"] for line in lines(folder / "out"))


@job(stopped)
def test_sigterm_saves_and_ends_with_code_75(results: Callable[..., Any]) -> None:
    code, saved, logged = results(stopped)
    assert code == 75 and saved >= 10 and logged <= saved


# The same bytes under every strategy and on the CPU.


def handed_on(folder: Path, model: str, precision: str) -> dict[str, Any]:
    """A CUDA run's checkpoint, restored and saved again by every strategy in turn, and by the CPU, which then trains on."""
    changed = {"train": {"steps": 3, "micro_batch": 8}, "optim": {"schedule": "constant"}}
    run(plain(folder / "first", model, parallel={"precision": precision}, **changed))
    saved = folder / "first" / "step-00000003"
    found: dict[str, Any] = {"first": digests(saved), "again": {}}
    for strategy in ("cpu", *(strategy for strategy in STRATEGIES if installed(strategy))):
        out, make = folder / strategy, recipe if strategy == "cpu" else plain
        chosen = {"strategy": "ddp" if strategy == "cpu" else strategy, "precision": precision}
        try:
            run(make(out, model, parallel=chosen, checkpoint={"resume": str(saved)}, **changed))
            found["again"][strategy] = digests(out / "step-00000003")
            saved = out / "step-00000003"
        except Exception:
            found["again"][strategy] = traceback.format_exc()
    longer = changed | {"train": {"steps": 6, "micro_batch": 8}, "checkpoint": {"resume": str(saved)}}
    found["on"] = [
        run(make(folder / f"on-{make.__name__}", model, parallel={"precision": "fp32"}, **longer)) for make in (recipe, plain)
    ]
    validation = [line for name in ("on-recipe", "on-plain") for line in lines(folder / name) if "val_loss" in line]
    found["validation"] = [line["val_loss"] for line in validation]
    return found


@pytest.mark.parametrize(
    ("model", "precision"),
    [pytest.param(*case, marks=job(handed_on, *case)) for case in (("convnext", "bf16"), ("resnet", "fp32"))],
)
def test_bytes_are_equal_after_resuming_elsewhere(results: Callable[..., Any], model: str, precision: str) -> None:
    found = results(handed_on, model, precision)
    assert found["first"]
    assert [name for name, files in found["again"].items() if files != found["first"]] == [], found["again"]
    here, there = found["on"]
    assert len(here) == 3 and there == pytest.approx(here, rel=1e-3 if model == "resnet" else 1e-4)
    assert found["validation"][1] == pytest.approx(found["validation"][0], rel=1e-3)


# A device without memory.

LARGE = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32 if on_cpu() else 128,
    "options": {"patch_size": 8, "depth": 6, "embed_dim": 48 if on_cpu() else 384, "num_heads": 3},
}


def without_memory(folder: Path, strategy: str) -> dict[str, Any]:
    """Leave the device memory for half of the micro-batch, and start twice."""
    from bigvision.config import load_config
    from bigvision.training import train_on_rank

    def made(name: str, micro_batch: int, steps: int = 3) -> dict[str, Any]:
        return plain(
            folder / name, parallel={"strategy": strategy},
            train={"steps": steps, "global_batch": 64, "micro_batch": micro_batch},
            data={"train": f"synthetic:128x{LARGE['image_size']}", "val": f"synthetic:8x{LARGE['image_size']}"},
        ) | {"model": LARGE}  # fmt: skip

    peaks = {size: peak_of(made(f"calibrate-{size}", size, steps=1)) for size in (32, 64)}
    gc.collect()
    if not on_cpu():
        torch.cuda.empty_cache()
    allow((peaks[32] + peaks[64]) / 2)
    words = ""
    try:
        train_on_rank(load_config(made("out", 64)))
    except torch.OutOfMemoryError as error:
        words = str(error)
    gc.collect()
    if not on_cpu():
        torch.cuda.empty_cache()
    train_on_rank(load_config(made("out", 64)))
    return {"error": words, "losses": losses(folder / "out"), "expected": run(made("expected", 32)), "peaks": peaks}


def allow(size: float) -> None:
    """Leave this process *size* bytes of the device; on the CPU, passes over at most 32 images."""
    if not on_cpu():
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
        return

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.LayerNorm) and len(inputs[0]) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    register_module_forward_pre_hook(before)


@pytest.mark.parametrize("strategy", [pytest.param(s, marks=[job(without_memory, s), *marks_of(s)]) for s in ("fsdp", "zero3")])
def test_a_lack_of_memory_halves_the_micro_batch(results: Callable[..., Any], strategy: str) -> None:
    found = results(without_memory, strategy)
    assert "out of memory" in found["error"] and "train.micro_batch 32 instead of 64" in found["error"], found
    assert found["losses"] == pytest.approx(found["expected"], rel=1e-4)


# Numbers that are not finite.


def spoiled(folder: Path, strategy: str, precision: str) -> dict[str, Any]:
    """A step, one with an image of NaN, and another."""
    import bigvision

    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32, generator=draw), torch.randint(0, 10, (8,), generator=draw)
    broken = images.clone()
    broken[3] = math.nan
    with bigvision.Engine(
        plain(folder / "out", "resnet", parallel={"strategy": strategy, "precision": precision}),
        num_classes=10, steps=20, global_batch=8, optim={"warmup": 0}, train={"micro_batch": 4},
    ) as engine:  # fmt: skip
        first = engine.train_step(images, labels)
        begin = bool(first.skipped)
        while first.skipped:  # fp16's first scale may be too large
            first = engine.train_step(images, labels)
        engine.save(folder / "before")
        result = engine.train_step(broken, labels)
        skipped, norm = bool(result.skipped), float(result.loss)
        engine.save(folder / "after")
        last = engine.train_step(images, labels)
        synchronize()
        steps = engine.step
        found = {"skipped": skipped, "loss": norm, "last": float(last.loss), "last skipped": bool(last.skipped), "begin": begin}
    before, after = (sorted((folder / name).glob("step-*"))[-1] for name in ("before", "after"))
    return found | {"files": (digests(before), digests(after)), "steps": steps}


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        pytest.param(*case, marks=[job(spoiled, *case, seconds=10), *marks_of(case[0])])
        for case in (("ddp", "bf16"), ("fsdp", "fp16"), ("zero2", "bf16"), ("zero3", "fp32"))
    ],
)
def test_a_step_that_is_not_finite_leaves_no_trace(results: Callable[..., Any], strategy: str, precision: str) -> None:
    found = results(spoiled, strategy, precision)
    assert found["skipped"] and not math.isfinite(found["loss"])
    assert found["files"][0] and found["files"][0] == found["files"][1]
    assert not found["last skipped"] and math.isfinite(found["last"])
