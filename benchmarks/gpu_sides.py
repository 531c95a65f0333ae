"""The sides of benchmarks/gpu.py: what takes a training step, and what is measured of it beside its time.

A side is named by what it is made of: "hand-written, compiled", "bigvision fsdp", "deepspeed zero2".
"""

from __future__ import annotations

import argparse
import atexit
import copy
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median
from typing import Any, get_args, get_type_hints

import timm
import torch
import yaml
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import Step, Work, accelerate_loop, hand_written, plain_deepspeed, plain_fully_shard
from benchmarks.step_time import fresh, mean_over_ranks
from bigvision import config as schema
from bigvision.config import Config, deepspeed_settings, load_config
from bigvision.data import Batch
from bigvision.models import find_blocks
from bigvision.runtime import Runtime
from bigvision.training.build import build_model

CLASSES = 10
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations per second, by a part of the device's name; the first that fits."""


@dataclass(frozen=True)
class Model:
    """A model and the samples of a step on one rank; *tiny* stands for it in a dry run on the CPU."""

    name: str
    batch: int
    tiny: str = "vit_tiny_patch16_224"
    tiny_options: dict[str, Any] = field(default_factory=lambda: {"patch_size": 8, "depth": 6, "embed_dim": 48, "num_heads": 3})
    drop_path: float = 0.0
    block: str = "Block"
    """The class that Accelerate wraps on several ranks."""


VIT_L = Model("vit_large_patch16_224", 192)
VIT_H = Model("vit_huge_patch14_224", 96)
VIT_G = Model("vit_giant_patch14_224", 64)
CONVNEXT_L = Model(
    "convnext_large", 128, "convnext_atto", {"depths": [1, 1, 2, 1], "dims": [18, 24, 36, 45]}, block="ConvNeXtBlock"
)
VIT_TI, VIT_S = Model("vit_tiny_patch16_224", 64), Model("vit_small_patch16_224", 64)
RESNET_18 = Model("resnet18", 64, "test_resnet", {}, block="BasicBlock")
RESNET_50 = Model("resnet50", 256, "test_resnet", {}, block="Bottleneck")


@dataclass(frozen=True)
class Side:
    """What takes the step."""

    kind: str
    """hand-written, fully_shard, deepspeed, accelerate or bigvision."""
    strategy: str = ""
    precision: str = "bf16"
    compiled: bool = False
    channels_last: bool = False
    ema: bool = False
    """Whether it averages its weights."""
    recompute: str = "none"
    offload: str = "none"
    graphs: bool = False
    """Whether its passes are CUDA graphs."""
    bound: float | None = None
    """The most that its time over the baseline's should be."""

    @property
    def name(self) -> str:
        words = {
            "amp_bf16": self.precision == "amp_bf16", "compiled": self.compiled, "channels_last": self.channels_last,
            "EMA": self.ema, "fp8": self.precision == "fp8", f"recompute {self.recompute}": self.recompute != "none",
            f"offload {self.offload}": self.offload != "none", "CUDA graphs": self.graphs,
        }  # fmt: skip
        return ", ".join([f"{self.kind} {self.strategy}".strip(), *(word for word, holds in words.items() if holds)])

    @property
    def missing(self) -> str:
        """Why it cannot be measured here, or nothing."""
        kinds = get_type_hints(schema.ParallelConfig)
        for key, value in (("precision", self.precision), ("offload", self.offload)):
            if value not in get_args(kinds[key]):
                return f"this version has no parallel.{key} {value}"
        if self.graphs and "cuda_graphs" not in kinds:
            return "this version has no parallel.cuda_graphs"
        if self.graphs and not torch.cuda.is_available():
            return "a CPU has no graphs"
        if self.offload != "none" and not torch.cuda.is_available():
            return "a CPU has no other memory"
        return ""


class Bench:
    """Builds sides of one model from the same first values, on one rank's device."""

    def __init__(self, model: Model, runtime: Runtime, batch: int | None = None) -> None:
        self.runtime, self.device, self.model = runtime, runtime.device, model
        self.dry = runtime.device.type == "cpu"
        self.batch = batch or (4 if self.dry else model.batch)
        self.side = 32 if self.dry else 224
        self.name, self.options = (model.tiny, model.tiny_options) if self.dry else (model.name, {})
        draw = torch.Generator().manual_seed(runtime.data_rank)
        images = torch.randint(0, 256, (self.batch, 3, self.side, self.side), dtype=torch.uint8, generator=draw)
        labels = torch.randint(0, CLASSES, (self.batch,), generator=draw)
        self.data = images.to(self.device), labels.to(self.device)
        self._fresh: nn.Module | None = None

    def build(self, side: Side) -> Step:
        """What takes a step on (uint8 images, labels)."""
        work = Work(precision="bf16")
        if side.kind == "bigvision":
            return self.ours(side)
        model = self.fresh()
        paths = [block.path for block in find_blocks(model, self.side)]
        units = [model.get_submodule(path) for path in paths]
        if side.kind == "hand-written":
            return hand_written(model, work, self.device, units if side.compiled else (), side.channels_last)
        if side.kind == "fully_shard":
            return plain_fully_shard(model, units, work, self.device, side.compiled)
        if side.kind == "deepspeed":
            sizes = [sum(parameter.numel() for parameter in unit.parameters()) for unit in units]
            total = sum(parameter.numel() for parameter in model.parameters())
            settings = deepspeed_settings(self.config(side), self.runtime.world_size, self.device.type, total, max(sizes))
            return plain_deepspeed(model, settings, work, self.device)
        return accelerate_loop(model, work, self.device, self.model.block)

    def fresh(self) -> nn.Module:
        """The model with its first values, on the CPU."""
        if self._fresh is None:
            asked = argparse.Namespace(
                model=self.name, options=yaml.safe_dump(self.options), image_size=self.side, batch=self.batch,
                precision="fp32", device=self.device.type,
            )  # fmt: skip
            self._fresh = fresh(asked, self.runtime)
        return copy.deepcopy(self._fresh)

    def config(self, side: Side) -> Config:
        """bigvision's configuration of the same work."""
        work = Work()
        drop_path = {"drop_path": self.model.drop_path} if self.model.drop_path else {}
        return load_config(
            {
                "model": {"name": self.name, "image_size": self.side, "options": self.options, **drop_path},
                "optim": {"lr": work.lr, "weight_decay": work.weight_decay, "clip": work.clip, "warmup": work.warmup},
                "parallel": {
                    "strategy": side.strategy, "precision": side.precision, "compile": side.compiled,
                    "device": self.device.type, "recompute": side.recompute, "offload": side.offload,
                    **({"cuda_graphs": True} if side.graphs else {}),
                },
                "train": {"global_batch": self.batch * self.runtime.data_ranks},
                "ema": {"decay": 0.9999 if side.ema else None},
            }
        )  # fmt: skip

    def ours(self, side: Side) -> Step:
        """One call of ``engine.train_step``."""
        engine, _, _ = build_model(self.config(side), CLASSES, self.runtime, steps=Work().steps, say=lambda text: None)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            every = torch.ones_like(labels, dtype=torch.bool)
            return engine.train_step(Batch(images, labels, labels, every)).loss

        return step

    def flops(self) -> float:
        """Of the forward and backward pass of one image: three times the forward pass's products and convolutions.

        The counter's own figure for the backward pass of grouped convolutions is many times too large.
        """
        with torch.device("meta"):
            options: dict[str, Any] = self.options | ({"img_size": self.side} if self.name.startswith("vit") else {})
            model = timm.create_model(self.name, num_classes=CLASSES, **options)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(2, 3, self.side, self.side, device="meta"))
        return 3 * counter.get_total_flops() / 2

    def finish(self) -> None:
        """Wait for the device."""
        if not self.dry:
            torch.cuda.synchronize()


class Stopwatch:
    """Takes a side's steps, and times each one by events in the device's stream, for which nobody waits."""

    def __init__(self, step: Step, bench: Bench) -> None:
        self.step, self.bench = step, bench
        self.marks: list[Any] = []

    def __call__(self) -> Tensor:
        loss = self.step(*self.bench.data)
        if self.bench.dry:
            self.marks.append(time.perf_counter())
        else:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        return loss

    def steps(self, calls: int) -> list[float]:
        """Milliseconds of each step but the first of each round, which has *calls* and one more."""
        rounds = [self.marks[at : at + calls + 1] for at in range(0, len(self.marks), calls + 1)]
        return [self._between(one, other) for marks in rounds for one, other in pairwise(marks)]

    def _between(self, one: Any, other: Any) -> float:
        return 1e3 * (other - one) if self.bench.dry else one.elapsed_time(other)


def start_side(bench: Bench, side: Side) -> tuple[Stopwatch, dict[str, Any]]:
    """Build a side and take its first steps; returns it and what was measured of that."""
    # No side finds what another has compiled.
    torch._dynamo.reset()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="inductor-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    before = allocated(bench)
    begin = time.perf_counter()
    watch = Stopwatch(bench.build(side), bench)
    bench.finish()
    built = time.perf_counter()
    loss = mean_over_ranks(watch(), bench.runtime)
    bench.finish()
    facts: dict[str, Any] = {
        "build": built - begin,
        "first step": time.perf_counter() - built,
        "loss": loss,
        "bound": side.bound,
    }
    watch()
    bench.finish()
    if not bench.dry:
        rest = allocated(bench)
        torch.cuda.reset_peak_memory_stats()
        watch()
        bench.finish()
        # What other sides hold meanwhile is none of it.
        facts["peak memory"] = torch.cuda.max_memory_allocated() - before
        facts["memory at rest"] = rest - before
    return watch, facts


def warm_compiler(device: torch.device) -> None:
    """Compile something small: a process's first compilation also starts what the compiler is made of."""
    small = torch.ones(64, 64, device=device, requires_grad=True)
    torch.compile(lambda x: (x.sin() @ x).relu())(small).sum().backward()


def allocated(bench: Bench) -> int:
    """Bytes on the device."""
    return 0 if bench.dry else torch.cuda.memory_allocated()


def host_time(watch: Stopwatch, times: int = 5) -> float:
    """Milliseconds until a step returns to the host, behind an idle device."""
    found = []
    for _ in range(times):
        watch.bench.finish()
        begin = time.perf_counter()
        watch()
        found.append(1e3 * (time.perf_counter() - begin))
    watch.bench.finish()
    return median(found)


def idle_share(watch: Stopwatch, steps: int = 4) -> float | None:
    """The share of the time from the first to the last kernel of some steps in which none ran; None on the CPU."""
    if watch.bench.dry:
        return None
    watch.bench.finish()
    gc.collect()
    gc.disable()  # as in benchmarks/harness.py
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            watch()
        watch.bench.finish()
    gc.enable()
    kernels = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        # Annotations span kernels, and the gaps between them.
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    return idle_of(kernels)


def idle_of(spans: Sequence[tuple[float, float]]) -> float | None:
    """The share of the time from the first begin to the last end that no span covers; None without spans."""
    if not spans:
        return None
    busy, reached = 0.0, min(begin for begin, _ in spans)
    first, last = reached, max(end for _, end in spans)
    for begin, end in sorted(spans):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return 1 - busy / (last - first) if last > first else None


def peak_of(name: str, asked: float | None) -> float | None:
    """The device's operations per second: *asked*, or by its *name*; None where that is not known."""
    return asked or next((peak for key, peak in PEAKS.items() if key in name), None)


def figures(milliseconds: Sequence[float], images: int, flops: float, peak: float | None, ranks: int) -> dict[str, Any]:
    """What follows from the times of single steps of *images* over all *ranks*."""
    middle = median(milliseconds)
    rate = images / middle * 1e3
    return {
        "ms": middle,
        "mean/median": mean(milliseconds) / middle,
        "images/s": rate,
        "mfu": rate * flops / (peak * ranks) if peak else None,
    }
