"""Predicted times beside those that were measured, and what they must do whatever the hardware."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from bigvision import load_config
from bigvision.config import ONE_STAGE, Config, with_values
from bigvision.pipeline import Placement, StageMemory, plan_stages
from bigvision.pipeline.schedules import USABLE
from bigvision.pipeline.stages import DoesNotFit
from bigvision.planning import calibrate
from bigvision.planning.choice import largest
from bigvision.planning.division import cut_stages
from bigvision.planning.estimates import Estimates, with_size
from bigvision.planning.hardware import parse_hardware
from bigvision.planning.operations import Work
from bigvision.planning.profile import Profile, planned, profile
from bigvision.planning.state import Layout
from bigvision.planning.timing import Clock, simulate, step_time
from bigvision.runtime import start
from bigvision.tasks import build_task

MEASURED = {
    ("vit_large_patch16_224", 192, False): (212.0, False),
    ("vit_large_patch16_224", 192, True): (175.0, False),
    ("vit_huge_patch14_224", 96, True): (240.5, True),
    ("resnet50", 256, False): (64.8, True),
    ("convnext_large", 96, False): (118.0, True),
    ("convnext_large", 128, True): (137.1, False),
}
"""Model, batch, whether blocks are compiled: ms of a step on one H100 in bf16 (docs/measurements.md), and whether the shares of
the H100's peaks come from it."""


def configured(name: str, batch: int, **parallel: Any) -> Config:
    model = {"name": name, "num_classes": 1000}
    return load_config({"model": model, "parallel": {"strategy": "ddp"} | parallel, "train": {"global_batch": batch}})


@pytest.mark.long
def test_times_of_an_h100() -> None:
    hardware = parse_hardware("H100")
    found = {}
    for name, batch, compiled in MEASURED:
        config = configured(name, batch, compile=compiled)
        found[name, batch, compiled] = step_time(profile(config, 1000), config, Layout.of(config, 1), hardware).total * 1e3
    for key, (measured, calibrates) in MEASURED.items():
        assert found[key] == pytest.approx(measured, rel=0.05 if calibrates else 0.15), (key, found[key])
    for one, (measured, _) in MEASURED.items():
        for other, (slower, _) in MEASURED.items():
            assert slower < 1.1 * measured or found[one] < found[other], (one, other)


@cache
def small(**parallel: Any) -> tuple[Config, Profile]:
    """A ViT of four blocks, and a config that does not say how large the batch is."""
    config = load_config(
        {
            "model": {"name": "vit_small_patch16_224", "num_classes": 10, "options": {"depth": 4}},
            "parallel": {"strategy": "fsdp"} | parallel,
        }
    )
    return config, profile(config, 10)


def timed(hardware: str, batch: int, micro: int | None = None, **parallel: Any) -> Any:
    config, counted = small(**parallel)
    config = replace(config, train=replace(config.train, global_batch=batch, micro_batch=micro))
    here = parse_hardware(hardware)
    return step_time(counted, config, Layout.of(config, here.ranks), here)


@pytest.mark.long
def test_a_teachers_forward_pass_takes_time(tmp_path: Path) -> None:
    """Nearly as long as the forward passes of the student, where the teacher is the same model: it keeps nothing for later."""
    model = {"name": "vit_small_patch16_224", "num_classes": 10, "options": {"depth": 4}}
    here = timm.create_model(model["name"], num_classes=10, depth=4)
    save_file(here.state_dict(), tmp_path / "model.safetensors")
    facts = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3}
    card = {"architecture": model["name"], "num_classes": 10, "pretrained_cfg": facts, "model_args": {"depth": 4}}
    (tmp_path / "config.json").write_text(json.dumps(card))
    train, hardware = {"global_batch": 512, "micro_batch": 32}, parse_hardware("2xH100")
    for strategy in ("ddp", "fsdp"):
        plain: dict[str, Any] = {"model": model, "train": train, "parallel": {"strategy": strategy}}
        alone, taught = load_config(plain), load_config(plain | {"task": {"teacher": str(tmp_path)}})
        times = [step_time(profile(one, 10), one, Layout.of(one, 2), hardware) for one in (alone, taught)]
        added = times[1].forward - times[0].forward
        assert 0.5 * times[0].forward < added < 1.05 * times[0].forward
        assert times[1].total > times[0].total + 0.9 * added


@pytest.mark.long
def test_what_must_hold_on_any_hardware() -> None:
    base = timed("8xH100", 1024)
    assert base.total == pytest.approx(base.forward + base.backward + base.optimizer + base.exposed, rel=0.2)
    assert timed("8xH100", 1024, 32).communication == pytest.approx(4 * base.communication, rel=0.3)  # gathered four times
    assert timed("8xL40S", 1024).total > 2 * base.total
    assert timed("2x8xH100", 2048).exposed >= base.exposed
    again = timed("8xH100", 1024, recompute="blocks")
    # Also in compiled blocks, whose graphs recompute. The last product is not needed again.
    assert 0.6 * again.forward < again.recompute < again.forward and again.total > base.total
    kept = timed("8xH100", 1024, recompute="selective")
    assert 0 < kept.recompute < 0.7 * again.recompute and base.total < kept.total < again.total
    for one in (again, kept):
        assert one.backward == pytest.approx(base.backward, rel=0.15)
        assert one.mfu * one.total == pytest.approx(base.mfu * base.total), "what is computed again does not count"
    assert 0 < again.mfu < base.mfu < 1
    assert timed("8xH100", 1024, compile=False).total > base.total
    # Copies of the model in each host need the links between hosts once in a step.
    whole, hybrid = (timed("64x8xH100", 64 * 1024, 16, replicas=replicas) for replicas in (1, 64))
    assert hybrid.exposed < whole.exposed
    assert timed("8xH100", 1024, strategy="ddp").communication < base.communication


@pytest.mark.parametrize(("schedule", "ideal"), [("gpipe", 3 / 11), ("1f1b", 3 / 11), ("interleaved", 3 / 19), ("zbv", 0.0)])
def test_bubbles_are_those_of_torchs_order(schedule: str, ideal: float) -> None:
    placement = Placement(4, 1 if schedule in ONE_STAGE else 2, schedule == "zbv")
    busy: dict[int, dict[str, float]] = {rank: {} for rank in range(4)}
    seconds = {"forward": 1.0, "backward": 2.0, "recompute": 0.0}
    end = simulate(schedule, placement, [seconds] * placement.stages, [(0.0, 0.0)] * placement.stages, 8, busy)
    shares = [1 - sum(spent.values()) / end for spent in busy.values()]
    assert shares == [pytest.approx(ideal, abs=0.07 if schedule == "zbv" else 1e-9)] * 4
    late = simulate(schedule, placement, [seconds] * placement.stages, [(0.5, 0.25)] * placement.stages, 8, busy)
    assert late > end


@pytest.mark.parametrize(
    ("name", "options", "stages"),
    [("vit_tiny_patch16_224", {"depth": 5}, 2), pytest.param("convnext_atto", {}, 3, marks=pytest.mark.long)],
)
def test_stages_are_priced_where_the_engine_cuts(name: str, options: dict[str, Any], stages: int) -> None:
    """Also in the middle of a block, and not where equal FLOPs of whole blocks would meet."""
    model = {"name": name, "num_classes": 10, "options": options}
    parallel = {"strategy": "pipeline", "stages": stages, "device": "cpu", "precision": "fp32", "compile": False}
    config = load_config({"model": model, "parallel": parallel, "train": {"global_batch": 4 * stages}})
    counted, layout = profile(config, 10), Layout.of(config, stages)
    found = cut_stages(counted, config, layout)
    made, blocks = planned(config, 10, build_task(config.task))
    memory = StageMemory.of(config, Placement(stages, 1, False), 4, 1, 1)
    plan = plan_stages(made.module, blocks, made.input_shape, torch.device("cpu"), memory)
    assert found.costs == plan.costs, "the engine's stages"
    of_parts = [sum(shares.get(number, 0.0) for shares in found.shares) for number in range(len(counted.parts))]
    assert of_parts == pytest.approx([1.0] * len(of_parts)), "all that is computed is on a stage"
    assert any(0 < share < 1 for shares in found.shares for share in shares.values()), "a block is cut"
    for shares, cost in zip(found.shares, found.costs, strict=True):
        flops = sum(share * counted.parts[number].forward_flops for number, share in shares.items())
        assert flops == pytest.approx(cost.flops, rel=0.03)
    for stage, units in enumerate(found.units):
        assert sum(tensor.numel for unit in units for tensor in unit if not tensor.buffer) == plan.costs[stage].parameters
        assert len(units) == len(plan.blocks[stage]) + 1


@pytest.mark.long
def test_stages_are_priced_where_memory_lets_the_engine_cut() -> None:
    """The first of two stages keeps two micro-batches: where that is too much for a device, it gets fewer blocks."""
    parallel = {"strategy": "pipeline", "stages": 2, "device": "cpu", "precision": "fp32", "compile": False}
    model = {"name": "vit_tiny_patch16_224", "num_classes": 10, "options": {"depth": 6}}
    config = load_config({"model": model, "parallel": parallel, "train": {"global_batch": 64, "micro_batch": 16}})
    counted, layout = profile(config, 10), Layout.of(config, 2)
    even = cut_stages(counted, config, layout)
    needs = [even.memory.needed(stage, cost) for stage, cost in enumerate(even.costs)]
    made, blocks = planned(config, 10, build_task(config.task))
    for capacity, moved in ((1.01 * max(needs), False), (0.9 * max(needs), True)):
        memory = StageMemory.of(config, Placement(2, 1, False), 16, 1, 1, capacity)
        plan = plan_stages(made.module, blocks, made.input_shape, torch.device("cpu"), memory)
        found = cut_stages(counted, config, replace(layout, capacity=capacity))
        assert found.costs == plan.costs, "the engine's stages"
        assert (found.costs != even.costs) is moved
        assert all(memory.needed(stage, cost) <= capacity for stage, cost in enumerate(found.costs))
    with pytest.raises(DoesNotFit, match="no cut of vit_tiny_patch16_224 into 2 stages fits the devices' memory"):
        cut_stages(counted, config, replace(layout, capacity=0.3 * max(needs)))
    # On a GPU for whose memory the largest micro-batch is the one that a cut still fits.
    device = replace(parse_hardware("H100").device, memory=360 * 2**20 / USABLE)
    estimates = Estimates(replace(parse_hardware("2xH100"), device=device))
    on_gpus = with_values(config, {"parallel.device": "auto"})
    sizes = [size for size in (1, 2, 4, 8, 16, 32) if estimates.fits(with_size(on_gpus, size))]
    assert sizes == [1, 2, 4, 8] and largest(estimates, on_gpus, 64) == 8


def test_ten_thousand_ranks_take_no_longer_than_one() -> None:
    small()
    began = time.process_time()
    found = timed("16384xH100", 16384 * 64, 16)
    assert time.process_time() - began < 2 and found.total > 0


def test_calibration_measures_what_plans_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward passes, layouts and kinds of convolutions have rates of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    monkeypatch.setattr(calibrate, "NETWORK", 1)
    monkeypatch.setattr(calibrate, "TURNS", 2)
    for name, sizes in (("PRODUCTS_OF", ((8, 8, 8),)), ("ATTENTION", ((1, 1, 8, 8),)), ("VALUES", (1 << 12, 1 << 18))):
        monkeypatch.setattr(calibrate, name, {"cpu": sizes})
    small = {what: tuple((2, *widths[1:3], 8) for widths in shapes[:1]) for what, shapes in calibrate.CONVOLUTIONS.items()}
    monkeypatch.setattr(calibrate, "CONVOLUTIONS", small)
    monkeypatch.setattr(calibrate, "FRESH", {"cpu": 1 << 14})
    with start("cpu") as runtime:
        calibrate.calibrate(runtime, lambda line: None)
    hardware = parse_hardware("here")
    curves = hardware.device.rates.curves
    kinds = [f"convolution fp32{back}{kind}" for back in ("", " back") for kind in ("", " pointwise", " image")]
    kinds += [f"grouped fp32{back}{kind}" for back in ("", " back") for kind in ("", " depthwise")]
    both = [f"{kind}{back}" for kind in ("norm", "curved", "pool", "attention fp32") for back in ("", " back")]
    assert {*both, *kinds, *(f"{kind} last" for kind in kinds), "norm batch", "norm back batch last", "add"} <= curves.keys()
    slow = replace(hardware.device.rates, curves={**curves, "grouped fp32 back depthwise last": ((1.0, 1.0),)})
    clock = Clock(replace(hardware.device, rates=slow))
    work = Work("grouped", "fp32", 5.0, 0.0, variant="back depthwise last")
    assert clock.works([work], 2).device == pytest.approx(10.0 * slow.gaps, rel=0.01)
    other = replace(work, variant="back depthwise")
    assert clock.works([other], 2).device < 1.0
    assert clock.works([replace(work, variant="back depthwise unknown")], 2) == clock.works([other], 2)
