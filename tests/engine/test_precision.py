"""Formats, loss scaling and compiled blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bigvision.config import Config, load_config
from bigvision.data import Batch
from bigvision.engine import Engine
from bigvision.engine.engine import TrainingEngine
from bigvision.engine.precision import LossScale
from bigvision.runtime import Runtime, start
from bigvision.training.build import build_model
from tests.distributed import run_ranks
from tests.recipes import recipe, run


@pytest.mark.parametrize(
    "model", ["vit", *(pytest.param(name, marks=pytest.mark.long) for name in ("resnet", "swin", "eva02"))]
)
def test_bf16_is_near_fp32_and_keeps_fp32_masters(tmp_path: Path, model: str) -> None:
    short = {"steps": 5, "micro_batch": 6}
    reference = run_ranks(run, 1, recipe(tmp_path / "fp32", model, train=short))[0]
    for strategy in ("ddp", "fsdp"):
        out = tmp_path / strategy
        plain = recipe(out, model, train=short, parallel={"strategy": strategy, "precision": "bf16"})
        losses = run_ranks(run, 2, plain)[0]
        assert losses == pytest.approx(reference, rel=3e-2) and losses != reference
        saved = load_file(out / "step-00000005" / "model.safetensors")
        assert all(t.dtype == torch.float32 for t in saved.values() if t.is_floating_point())
        weight = next(t for t in saved.values() if t.ndim > 1 and t.is_floating_point())
        assert not torch.equal(weight, weight.bfloat16().float()), "the masters were rounded"


def engine_on_rank(plain: dict[str, Any], runtime: Runtime) -> tuple[Engine, Config]:
    config = load_config(plain)
    engine, _, _ = build_model(config, 10, runtime, steps=100, say=lambda text: None)
    return engine, config


def random_batch(runtime: Runtime, size: int = 4) -> Batch:
    draw = torch.Generator().manual_seed(runtime.rank)
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 10, (size,), generator=draw)
    return Batch(images, labels, labels, torch.ones(size, dtype=torch.bool))


def overflow(plain: dict[str, Any]) -> None:
    with start("cpu") as runtime:
        engine, _ = engine_on_rank(plain, runtime)
        assert isinstance(engine, TrainingEngine)
        batch = random_batch(runtime)
        engine.stepper.scale.scale.fill_(2.0**8)
        assert not engine.train_step(batch).skipped
        before = [fragment.values.clone() for fragment in engine.fragments()]
        steps, scale = engine.scalars()["optimizer_steps"], 2.0**60
        engine.stepper.scale.scale.fill_(scale)
        result = engine.train_step(batch)
        assert result.skipped and not torch.isfinite(result.grad_norm)
        assert all(torch.equal(a, f.values) for a, f in zip(before, engine.fragments()))
        assert engine.scalars() | {"good_steps": 0} == {
            "step": 2, "skipped": 1, "samples": 2 * 4 * runtime.world_size, "optimizer_steps": steps,
            "loss_scale": scale / 2, "good_steps": 0,
        }  # fmt: skip
        engine.stepper.scale.scale.fill_(2.0**8)
        result = engine.train_step(batch)
        assert not result.skipped and torch.isfinite(result.loss)
        assert not all(torch.equal(a, f.values) for a, f in zip(before, engine.fragments()))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_fp16_skips_a_step_that_overflows(tmp_path: Path, strategy: str) -> None:
    plain = recipe(tmp_path, parallel={"strategy": strategy, "precision": "fp16"}, train={"global_batch": 8})
    run_ranks(overflow, 2, plain)


def test_fp16_clips_the_unscaled_gradient(tmp_path: Path) -> None:
    short: dict[str, Any] = {"train": {"steps": 5}, "optim": {"clip": 0.05, "name": "sgd", "lr": 0.5}}
    reference = run_ranks(run, 1, recipe(tmp_path / "fp32", **short))[0]
    half = run_ranks(run, 1, recipe(tmp_path / "fp16", **short, parallel={"precision": "fp16"}))[0]
    assert half == pytest.approx(reference, rel=1e-3)


def test_loss_scale_grows_and_shrinks() -> None:
    scale, yes, no = LossScale("fp16", torch.device("cpu")), torch.tensor(True), torch.tensor(False)
    for _ in range(LossScale.growth_interval):
        assert not scale.update(no, yes)
    assert scale.state() == {"loss_scale": 2.0**17, "good_steps": 0}
    scale.update(no, yes)
    assert scale.update(yes, yes)
    assert scale.state() == {"loss_scale": 2.0**16, "good_steps": 0}
    scale.update(no, yes)
    assert not scale.update(yes, no), "a loss that is not finite is no overflow"
    assert scale.state() == {"loss_scale": 2.0**16, "good_steps": 1}
    scale.scale.fill_(1.0)
    assert not scale.update(yes, yes), "at the least scale it is no overflow to be expected"
    assert scale.state()["loss_scale"] == 1.0
    fixed = LossScale("bf16", torch.device("cpu"))
    assert not fixed.update(yes, yes) and fixed.factor == 1.0


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_compiled_blocks_change_nothing(tmp_path: Path, strategy: str) -> None:
    short = {"steps": 4, "micro_batch": None}
    reference = run_ranks(run, 1, recipe(tmp_path / "plain", train=short))[0]
    plain = recipe(tmp_path / strategy, train=short, parallel={"strategy": strategy, "compile": True, "recompute": "blocks"})
    assert run_ranks(run, 2, plain)[0] == pytest.approx(reference, rel=1e-5)
