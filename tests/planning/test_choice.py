"""Which layouts auto takes and `bigvision plan` lists, of a model with simple numbers in the place of a profile."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigvision.config import Config, load_config, micro_batch, with_values
from bigvision.errors import UserError
from bigvision.planning import choice, command, estimates
from bigvision.planning.beside import can_fork
from bigvision.planning.choice import NothingFits, plan
from bigvision.planning.hardware import LINKS, Hardware, parse_hardware
from bigvision.planning.memory import Memory
from bigvision.planning.timing import StepTime

GIB = 1 << 30


REAL = choice.Estimates


class Simple(choice.Estimates):
    """A model of *parameters* with *blocks*, of which an image keeps *image* bytes, a tenth with recompute."""

    parameters, image, blocks, norm = 2e9, 0.5 * GIB, 40, False

    def profile(self, config: Config) -> Any:
        if config.model.name == "unplannable":
            raise RuntimeError("it reads\nits values")
        tensor = SimpleNamespace(name="norm.running_var", buffer=self.norm)
        parts = [SimpleNamespace(path=f"blocks.{number}") for number in range(self.blocks)]
        return SimpleNamespace(parts=parts, tensors=[tensor], parameters=self.parameters, image=(3, 224, 224), flops=1e12)

    def built(self, config: Config) -> Any:
        return None, [None] * self.blocks

    def memory(self, config: Config) -> Any:
        parallel, ranks = config.parallel, self.hardware.ranks
        stages = parallel.pipeline_ranks or ranks
        weights = 16 * self.parameters * (0.01 if config.model.lora else 1)
        shards = {"ddp": 1, "zero1": 2, "zero2": 3}.get(parallel.strategy, ranks // parallel.replicas)
        recomputed = {"blocks": 0.1, "selective": 0.6}.get(parallel.recompute, 1.0)
        recomputed *= 0.05 if parallel.offloads_activations else 1.0
        size = micro_batch(config, ranks // stages, stages)
        peak = weights / shards + size * self.image * recomputed / stages * min(4, stages)
        host = 8 * self.parameters / shards if parallel.offloads_state else 0
        kept = {"rank": ranks - 1, "peak": peak, "host": host, "pinned": GIB if parallel.offloads_activations else 0}
        return Memory(**dict.fromkeys((field.name for field in fields(Memory)), 0) | kept)

    def time(self, config: Config) -> Any:
        slower = {"ddp": 1.0, "fsdp": 1.02, "pipeline": 1.3}.get(config.parallel.strategy, 1.2)
        slower *= {"blocks": 1.3, "selective": 1.05}.get(config.parallel.recompute, 1.0)
        seconds = slower * config.train.global_batch / self.hardware.ranks / 100
        known = {"total": seconds, "images_per_second": config.train.global_batch / seconds, "mfu": 0.4 / slower}
        return StepTime(**dict.fromkeys((field.name for field in fields(StepTime)), 0.0) | known)

    def least(self, config: Config, strategy: str) -> float:
        return config.train.global_batch / self.hardware.ranks / 100


@pytest.fixture(autouse=True)
def simple(monkeypatch: pytest.MonkeyPatch) -> type[Simple]:
    class Fresh(Simple):
        pass

    monkeypatch.setattr(choice, "Estimates", Fresh)
    return Fresh


def choose(config: Config, hardware: str) -> choice.Choice:
    return choice.choose(config, choice.Estimates(parse_hardware(hardware)))


def config(**sections: dict[str, Any]) -> Config:
    return load_config({"out": "out", "train": {"global_batch": 64}} | sections)


def test_one_device_has_the_plain_module_and_several_shard_what_one_cannot_hold() -> None:
    assert choose(config(), "H200").values == {"parallel.strategy": "ddp"}
    made = choose(config(), "8xH200")
    assert made.values == {"parallel.strategy": "ddp"}, "what is simpler and about as fast goes first"
    assert "8xH200" in made.reason and "\n" not in made.reason
    made = choose(config(), "8xRTX4090")
    assert made.values == {"parallel.strategy": "fsdp"} and "ddp needs 33" in made.reason, made.reason
    kept = config(parallel={"replicas": 2})
    assert choose(kept, "8xRTX4090").values == {"parallel.strategy": "fsdp"}, "what the recipe says stays"


def test_recompute_and_micro_batch_follow_from_memory(simple: type[Simple]) -> None:
    open_ = config(train={"global_batch": 512, "micro_batch": "auto"}, parallel={"recompute": "auto"})
    made = choose(open_, "8xRTX4090").values
    assert made["parallel.strategy"] == "fsdp" and made["parallel.recompute"] == "none"
    assert made["train.micro_batch"] == 32, "38 would fit, and 64 samples in two parts are 32"
    whole = config(train={"global_batch": 512}, parallel={"recompute": "auto"})
    for simple.image, recompute in ((0.2 * GIB, "none"), (0.4 * GIB, "selective"), (0.5 * GIB, "blocks")):
        chosen = choose(with_values(whole, {"parallel.strategy": "fsdp"}), "8xRTX4090")
        assert chosen.values["parallel.recompute"] == recompute, "64 images at once, 18 GiB for them"
        rows = plan(whole, parse_hardware("8xRTX4090")).rows
        listed = {one.config.parallel.recompute for one in rows if one.name == "fsdp"}
        assert listed == ({"none"} if recompute == "none" else {"none", "blocks", "selective"}), "where a larger part fits so"
        assert not any(one.config.parallel.recompute == "selective" for one in rows if one.name.startswith("pipeline"))
    simple.image = 0.2 * GIB
    asked = plan(config(parallel={"recompute": "blocks"}), parse_hardware("8xRTX4090")).rows
    assert {one.config.parallel.recompute for one in asked if one.name == "fsdp"} == {"none", "blocks"}, "it is asked for"
    simple.image = 30.0 * GIB
    made = choose(open_, "8xRTX4090").values
    assert (made["parallel.recompute"], made["train.micro_batch"]) == ("blocks", 5)
    with pytest.raises(NothingFits, match=r"nothing fits on 8xRTX4090: pipeline.* needs .* GiB.* would with") as caught:
        choose(config(), "8xRTX4090")
    assert "\n" not in str(caught.value)


def test_batchnorm_takes_its_statistics_over_a_micro_batch(simple: type[Simple]) -> None:
    simple.norm = True
    with pytest.raises(UserError, match=r"train\.micro_batch: auto, but .* BatchNorm.*give a number, or null"):
        choose(config(train={"micro_batch": "auto"}), "H200")
    assert choose(config(), "H200").values == {"parallel.strategy": "ddp"}


def test_the_table_ranks_what_fits_and_says_what_would_make_the_rest_fit() -> None:
    found = plan(config(), parse_hardware("8xRTX4090"))
    speeds = [one.time.images_per_second for one in found.rows]
    assert speeds == sorted(speeds, reverse=True) and found.rows[0].name == "fsdp"
    assert found.rows[0].values == {"parallel.strategy": "fsdp", "train.micro_batch": 8}
    lacking = {one.name: one for one in found.refusals if one.config.parallel.recompute == "none"}
    assert "needs 30.3" in lacking["ddp"].why and "on rank 7" in lacking["ddp"].why
    assert lacking["ddp"].change is not None
    text = "\n".join(command.table(found))
    assert "fsdp" in text and "the first: --parallel.strategy fsdp --train.micro_batch 8" in text and "host" not in text
    assert command.as_dict(found)["rows"][0]["strategy"] == "fsdp"
    asked = plan(config(parallel={"strategy": "zero2"}, train={"global_batch": 64, "micro_batch": 4}), parse_hardware("8xH200"))
    assert {one.micro_batch for one in asked.rows} == {4} and {one.largest for one in asked.rows if one.name == "ddp"} == {8}


def test_the_hosts_memory_is_in_the_table_where_something_is_offloaded() -> None:
    found = plan(config(parallel={"strategy": "zero2", "offload": "optimizer+activations"}), parse_hardware("8xH200"))
    head, *lines = command.table(found)[4:]
    (mine,) = (line for line in lines if "offload optimizer+activations" in line and " none " in line)
    assert head.endswith("host GiB") and mine.endswith("  5.97"), mine
    assert any(line.endswith("  0.00") for line in lines), "nothing of a layout that offloads nothing is there"


def test_offloaded_activations_are_a_change_that_makes_a_layout_fit(simple: type[Simple]) -> None:
    """Where blocks are recomputed already, or cannot be: with BatchNorm compiled code excludes it."""
    simple.parameters, simple.image = 1e9, 80.0 * GIB
    lacking = {one.config.parallel.recompute: one.change for one in plan(config(), parse_hardware("RTX4090")).refusals}
    assert lacking == {"none": "parallel.offload activations", "blocks": "parallel.offload activations"}
    simple.image = 400.0 * GIB
    lacking = {one.config.parallel.recompute: one.change for one in plan(config(), parse_hardware("RTX4090")).refusals}
    assert lacking["none"] == "parallel.recompute blocks and parallel.offload activations"
    simple.image = 8.0 * GIB
    plain = config(parallel={"strategy": "zero2", "recompute": "none"})
    assert "parallel.offload" not in (plan(plain, parse_hardware("8xRTX4090")).refusals[0].change or "")
    named = {one.name for one in plan(config(parallel={"offload": "activations"}), parse_hardware("8xRTX4090")).rows}
    assert "fsdp, offload activations" in named and not any(name.startswith("pipeline") and "offload" in name for name in named)


def test_offloaded_activations_need_another_memory() -> None:
    with pytest.raises(UserError, match=r"parallel.offload: activations needs devices with memory of their own, not a CPU"):
        plan(config(parallel={"strategy": "ddp", "offload": "activations", "device": "cpu"}), parse_hardware("cpu"))


def test_a_model_that_fits_nowhere(simple: type[Simple]) -> None:
    simple.parameters = 200e9
    found = plan(config(), parse_hardware("8xH100"))
    assert not found.rows and found.advice is not None and "would with" in found.advice
    assert all(one.why for one in found.refusals)


@pytest.mark.parametrize(
    ("sections", "hardware", "words"),
    [
        ({"parallel": {"replicas": 3}}, "8xH100", ["parallel.replicas: 3", "8 ranks"]),
        ({"parallel": {"strategy": "pipeline", "stages": 3}}, "8xH100", ["parallel.stages: 3", "8 ranks"]),
        ({}, "48xH100", ["train.global_batch: 64", "48", "use 48 or 96"]),
    ],
)
def test_a_mesh_that_does_not_divide(sections: dict, hardware: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        plan(config(**sections), parse_hardware(hardware))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_teacher_is_held_as_the_engine_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under zero1 and zero2, and on one rank, whole on each rank; the student's weights are cast before either way."""
    monkeypatch.setattr(estimates, "profile", lambda config, *_: config.parallel.strategy)
    monkeypatch.setattr(REAL, "built", lambda *_: None)
    taught = config(task={"teacher": "vit_tiny_patch16_224"})
    for hardware, teacher in (("2xH100", "fsdp"), ("H100", "zero2")):
        known = REAL(parse_hardware(hardware))
        for strategy, expected in (("zero1", "zero2"), ("zero2", "zero2"), ("zero3", teacher), ("ddp", "ddp")):
            assert known.profile(with_values(taught, {"parallel.strategy": strategy})) == expected
            plain = known.profile(config(parallel={"strategy": strategy}))
            assert plain == ("ddp" if strategy == "ddp" else "fsdp"), "no profile more than without"


@pytest.mark.parametrize("hardware", ["2x4xH200", "4xRTX4090", "4xL40S"])
def test_a_plan_with_a_forked_process_is_the_plan_without(hardware: str, simple: type[Simple]) -> None:
    """Where most layouts fit, where some do, and where nothing does."""
    devices = parse_hardware(hardware)
    for simple.parameters in (2e9, 2e10):
        for asked in (config(), config(parallel={"strategy": "pipeline"}), config(parallel={"strategy": "ddp"})):
            alone, forked = plan(asked, devices), plan(asked, devices, forks=True)
            assert forked.rows == alone.rows and forked.refusals == alone.refusals and forked.advice == alone.advice
            assert alone.rows or alone.refusals


def test_what_fails_in_the_forked_process_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    parent, looked_at, here = os.getpid(), choice._looked_at, list[str]()

    def fails_there(estimates: Any, recipe: Config, laid: Config, blocks: int) -> Any:
        assert os.getpid() == parent, "the other process cannot"
        here.append(laid.parallel.strategy)
        return looked_at(estimates, recipe, laid, blocks)

    monkeypatch.setattr(choice, "_looked_at", fails_there)
    rows = plan(config(), parse_hardware("4xH200"), forks=True).rows
    assert {row.config.parallel.strategy for row in rows} >= {"ddp", "fsdp"} and "ddp" in here


def test_nothing_is_forked_where_there_is_a_gpu_or_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU's machine tensors without values start CUDA, and a forked process could not."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert can_fork() == (sys.platform == "linux" and not torch.cuda.is_available())
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        assert not can_fork()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert not can_fork()


@pytest.mark.long
def test_a_real_models_plan_with_a_forked_process_is_the_plan_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "Estimates", REAL)
    sizes = {"depth": 2, "embed_dim": 768, "num_heads": 3, "patch_size": 16}
    asked = config(
        model={"name": "vit_tiny_patch16_224", "image_size": 32, "options": sizes, "num_classes": 10},
        parallel={"compile": False}, train={"global_batch": 4, "micro_batch": 1},
    )  # fmt: skip
    hardware = parse_hardware("2xH200")
    peaks = [row.memory.peak / estimates.USABLE for row in plan(asked, hardware).rows]
    for memory in (int(sum(peaks) / len(peaks)), int(min(peaks) / 2)):
        smaller = replace(hardware, device=replace(hardware.device, memory=memory))
        alone, forked = plan(asked, smaller), plan(asked, smaller, forks=True)
        assert forked.rows == alone.rows and forked.refusals == alone.refusals and forked.advice == alone.advice
        assert alone.refusals


@pytest.mark.long
def test_weights_are_gathered_within_a_host_where_that_is_faster_and_fits() -> None:
    """Of a real model on two hosts: over a slow network each host has a replica, unless memory takes all of them for one."""
    open_ = load_config({"model": {"name": "vit_tiny_patch16_224"}, "train": {"global_batch": 128}})
    quick = parse_hardware("2x4xH100")
    slow = replace(quick, between=replace(LINKS["Ethernet-10"], bandwidth=LINKS["Ethernet-10"].bandwidth / quick.per_host))
    known = REAL(quick)

    def chosen(hardware: Hardware) -> tuple[str, int]:
        made = choice.choose(open_, known.on(hardware))
        return made.values["parallel.strategy"], made.values.get("parallel.replicas", 1)

    assert chosen(quick)[1] == 1, "a replica on each host gains nothing where the network is fast"
    assert chosen(slow) == ("fsdp", 2)
    # Just too little memory for a replica on a host.
    layouts = [with_values(open_, {"parallel.strategy": "fsdp", "parallel.replicas": count}) for count in (1, 2)]
    whole, halves = (known.memory(layout).peak for layout in layouts)
    assert whole < halves
    memory = int((whole + halves) / 2 / estimates.USABLE)
    small = replace(slow, device=replace(slow.device, memory=memory))
    assert chosen(small) == ("fsdp", 1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "hardware", "batch", "strategies"),
    [
        ("resnet50", "RTX4090", 256, {"ddp"}),
        ("resnet50", "8xH100", 2048, {"ddp", "fsdp"}),
        ("vit_giant_patch14_dinov2", "8xRTX4090", 64, {"fsdp", "pipeline"}),
        ("vit_7b_patch16_dinov3", "8xH200", 64, {"fsdp", "pipeline"}),
    ],
)
def test_what_auto_takes_of_real_models_fits(model: str, hardware: str, batch: int, strategies: set[str]) -> None:
    parsed = parse_hardware(hardware)
    sizes = {} if model == "resnet50" else {"recompute": "auto"}
    plain = {"model": {"name": model}, "train": {"global_batch": batch}, "parallel": {"strategy": "auto", **sizes}}
    if model != "resnet50":
        plain["train"]["micro_batch"] = "auto"
    config = load_config(plain)
    made = choice.choose(config, REAL(parsed))
    assert made.values["parallel.strategy"] in strategies, made.reason
    chosen = with_values(config, made.values)
    assert REAL(parsed).memory(chosen).peak < 0.9 * parsed.device.memory, made.reason
