"""What this machine reaches: operations of each kind and size, links between its ranks. ``bigvision plan --calibrate``.

It takes less than a minute and writes JSON into the user's cache folder, one file for each number of ranks on this host, since
they share its memory and, on the CPU, its cores. Start it with torchrun to measure several ranks at once.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bigvision import disk
from bigvision.config import LimitsConfig
from bigvision.errors import Exit
from bigvision.planning.hardware import (
    LINKED,
    LINKS,
    Curve,
    Device,
    Hardware,
    Link,
    Rates,
    device_named,
    measured_file,
    to_json,
)
from bigvision.planning.operations import PRODUCTS, Log
from bigvision.runtime import Runtime, collective_timeout, start

SECONDS = 0.6
"""For each size of each kind of operation."""
PRECISIONS = {"cpu": {"fp32": torch.float32}, "cuda": {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}}
SIDES = {"cpu": (96, 256, 640), "cuda": (1024, 4096, 8192)}
"""Of the matrices that are multiplied."""
IMAGES = {"cpu": ((4, 64, 14), (8, 64, 28), (8, 128, 28)), "cuda": ((64, 256, 14), (64, 256, 56))}
"""(images, channels, side) of what is convolved."""
VALUES = {"cpu": (1 << 14, 1 << 18, 1 << 21, 1 << 23), "cuda": (1 << 20, 1 << 24, 1 << 28)}
"""Numbers in what is added, normalised and so on."""


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.log = Log()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.log.add(func, args, kwargs, result)
        return result


class _Meter:
    """Times of what all ranks do at once, as the slowest rank has them."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.overhead = runtime, 0.0
        self.rates: dict[str, Curve] = {}

    def seconds(self, run: Callable[[], object]) -> float:
        """The lower quartile of the times of one call."""
        device, times = self.runtime.device, list[float]()
        for _ in range(2):
            run()
        self._finish()
        began = time.perf_counter()
        run()
        self._finish()
        # Every rank repeats it as often.
        first = self._slowest(time.perf_counter() - began)
        for _ in range(max(3, min(200, int(SECONDS / max(first, 1e-6))))):
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        return self._slowest(statistics.quantiles(times, n=4)[0])

    def _finish(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)
        if self.runtime.world_size > 1:
            dist.barrier()

    def _slowest(self, seconds: float) -> float:
        if self.runtime.world_size == 1:
            return seconds
        most = torch.tensor(seconds, dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return float(most)

    def curve(self, kind: str, runs: list[Callable[[], object]], name: str | None = None, flops: float | None = None) -> None:
        """Measure the rate of operations of *kind* in *runs*, of rising size."""
        found = {}
        for run in runs:
            with _Counting() as counting:
                run()
            counted = counting.log.operations
            mine = [one for one in counted if one.kind == kind]
            amount = sum(one.flops if kind in PRODUCTS else one.moved for one in mine) if flops is None else flops
            seconds = self.seconds(run)
            rest = max(seconds - self.overhead * len(counted), seconds / 4)
            found[amount / max(1, len(mine))] = amount / rest
        self.rates[name or kind] = tuple(sorted(found.items()))


def calibrate(runtime: Runtime, say: Callable[[str], None] = print) -> Path:
    """Measure on all ranks at once, and return the file that rank 0 writes."""
    device, kind = runtime.device, runtime.device.type
    meter = _Meter(runtime)
    small = torch.ones(8, device=device, requires_grad=True)
    meter.overhead = meter.seconds(lambda: _backward(_chain(small), small)) / (2 * CHAIN)
    say(f"an operation by itself: {meter.overhead * 1e6:.1f} us")
    for name, dtype in PRECISIONS[kind].items():
        meter.curve("product", [_product(side, dtype, device) for side in SIDES[kind]], f"product {name}")
        for what, grouped in (("convolution", False), ("grouped", True)):
            runs = [_convolution(images, width, side, grouped, dtype, device) for images, width, side in IMAGES[kind]]
            meter.curve(what, runs, f"{what} {name}")
        attention, flops = _attention(dtype, device)
        meter.curve("attention", [attention], f"attention {name}", flops)
        best = {what: max(rate for _, rate in meter.rates[f"{what} {name}"]) / 1e9 for what in PRODUCTS}
        say(f"{name}: " + ", ".join(f"{what} {rate:,.0f} GFLOP/s" for what, rate in best.items()))
    for what, function in MOVED.items():
        meter.curve(what, [_moving(function, size, device) for size in VALUES[kind]])
    meter.rates["bytes"] = meter.rates["add"]
    meter.rates["optimizer"] = _optimizer(meter, device, VALUES[kind][1:])
    say("memory: " + ", ".join(f"{what} {meter.rates[what][-1][1] / 1e9:,.1f} GB/s" for what in (*MOVED, "optimizer")))
    within = _link(runtime, meter)
    say(f"between ranks: {within.bandwidth / 1e9:,.2f} GB/s, {within.latency * 1e6:.0f} us" if within.measured else "one rank")
    per_host = runtime.identity.local_world_size
    between = LINKS[LINKED["CPU"][1]]
    if kind == "cuda" and (listed := device_named(torch.cuda.get_device_name(device))):
        between = LINKS[LINKED[listed.name][1]]
    hardware = Hardware(_device(runtime, meter), runtime.world_size, per_host, within, between)
    path = measured_file(kind, per_host)
    if runtime.is_main:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        disk.replace(path, to_json(hardware).encode())
    return path


def run() -> int:
    """``bigvision plan --calibrate``, on each rank of this machine that a launcher started, or on one."""
    with start("auto", timeout=collective_timeout(LimitsConfig())) as runtime:
        say = print if runtime.is_main else lambda line: None
        say(f"kept in {calibrate(runtime, say)}: plans for this machine use it")
    return Exit.DONE


def _device(runtime: Runtime, meter: _Meter) -> Device:
    kind, per_host = runtime.device.type, runtime.identity.local_world_size
    peaks = {name: max(rate for _, rate in meter.rates[f"product {name}"]) for name in PRECISIONS[kind]}
    bandwidth = max(rate for _, rate in meter.rates["add"])
    rates = Rates(meter.rates, meter.overhead)
    if kind == "cuda":
        found = torch.cuda.get_device_properties(runtime.device)
        listed = device_named(found.name)
        flops, width = (listed.flops, listed.bandwidth) if listed else (peaks, bandwidth)
        return Device(found.name, found.total_memory, flops, width, "measured here", "this machine", "cuda", rates)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // per_host
    return Device("CPU", memory, peaks, bandwidth, "measured here", "this machine", "cpu", rates)


def _link(runtime: Runtime, meter: _Meter) -> Link:
    """Bandwidth and latency of all-reduces between the ranks of this host."""
    if runtime.world_size == 1:
        return LINKS[LINKED["CPU"][0]]
    share = 2 * (runtime.world_size - 1) / runtime.world_size
    small, large = (torch.zeros(size, device=runtime.device) for size in (16, 1 << 22))
    latency = meter.seconds(lambda: dist.all_reduce(small))
    seconds = meter.seconds(lambda: dist.all_reduce(large))
    steps = 2 * (runtime.world_size - 1)
    bandwidth = large.nbytes * share / max(seconds - latency, seconds / 4)
    return Link("measured", bandwidth, latency / steps, "all-reduces measured here", "this machine")


# What is measured.

CHAIN = 50


def _chain(value: torch.Tensor) -> torch.Tensor:
    for _ in range(CHAIN):
        value = value * 1.01
    return value


def _backward(output: torch.Tensor, *inputs: torch.Tensor) -> None:
    torch.autograd.grad(output, inputs, torch.ones_like(output))


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return lambda: torch.mm(left, right)


def _convolution(
    images: int, channels: int, side: int, grouped: bool, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:  # fmt: skip
    """Forward and backward, 3 x 3, or 7 x 7 for each channel by itself."""
    width = 7 if grouped else 3
    value = torch.randn(images, channels, side, side, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(channels, 1 if grouped else channels, width, width, dtype=dtype, device=device, requires_grad=True)
    groups = channels if grouped else 1
    return lambda: _backward(F.conv2d(value, weight, padding=width // 2, groups=groups), value, weight)


def _attention(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], object], float]:
    batch, heads, length, width = (4, 3, 196, 64) if device.type == "cpu" else (64, 16, 256, 64)
    parts = [torch.randn(batch, heads, length, width, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    flops = 3.5 * 4.0 * batch * heads * length * length * width
    return lambda: _backward(F.scaled_dot_product_attention(parts[0], parts[1], parts[2]), *parts), flops


MOVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda value: value + value.detach(),
    "curved": F.gelu,
    "norm": lambda value: F.layer_norm(value, value.shape[-1:]),
    "pool": lambda value: F.max_pool2d(value.view(1, -1, 16, 16), 3, 2, 1),
}


def _moving(function: Callable[[torch.Tensor], torch.Tensor], size: int, device: torch.device) -> Callable[[], object]:
    value = torch.randn(size // 256, 256, device=device, requires_grad=True)
    return lambda: _backward(function(value), value)


def _optimizer(meter: _Meter, device: torch.device, sizes: tuple[int, ...]) -> Curve:
    found = []
    for size in sizes:
        parameters = [torch.zeros(size // 8, device=device, requires_grad=True) for _ in range(8)]
        for one in parameters:
            one.grad = torch.ones_like(one)
        optimizer = torch.optim.AdamW(parameters, fused=True)
        found.append((32.0 * size, 28.0 * size / meter.seconds(optimizer.step)))
    return tuple(found)
