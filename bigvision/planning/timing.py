"""How long a training step takes: on paper, for one rank or ten thousand.

The program of a rank (`program.py`) runs on three clocks: of the host, the device and the link. Operations take the time of
their kind's share of the datasheet's peaks, or what was measured on this machine (`calibrate.py`).
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from bigvision.config import Config, micro_batch
from bigvision.models import float8
from bigvision.pipeline.schedules import Placement, passes_of
from bigvision.planning.division import cut_stages
from bigvision.planning.hardware import KEPT, Curve, Device, Hardware, Rates
from bigvision.planning.operations import PRODUCTS, Work, rate_name
from bigvision.planning.profile import Profile
from bigvision.planning.program import (
    COPIED,
    SUM_BYTES,
    Collective,
    Compute,
    Copy,
    Group,
    Instruction,
    Mesh,
    Start,
    computed,
    passes,
    reached,
    sharded_stages,
    teaching,
    update,
)
from bigvision.planning.state import Layout

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
SHARES = {
    "product": 0.73, "attention": 0.141, "convolution": 0.21, "grouped": 0.071, "bytes": 0.73, "optimizer": 0.46,
    "product fp8": float8.SHARE,
}  # fmt: skip
"""Of the peaks, what kinds of operations reach. From three of the times measured on an H100: ViT-H/14 with compiled blocks, of
which a profile gave the products, attention, the code between them and the optimizer; ResNet-50 (convolutions); ConvNeXt-L
(grouped convolutions, of the peak of fp32)."""
KERNEL = 3e-6
"""Seconds between two kernels of one device."""
GAPS = 1.045
"""What a step takes over the sum of its kernels, from the same profile of the ViT-H."""
HOST = 3e-5
"""Seconds of the host for an operation of eager code, and for all that is compiled between two products."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step on the slowest rank."""

    forward: float
    backward: float
    recompute: float
    optimizer: float
    communication: float
    """All collectives, as if nothing ran beside them."""
    exposed: float
    """What of that computing waits for."""
    bubble: float
    """Of a pipeline: waiting for other stages."""
    offload: float
    """What computing waits for copies of activations to the host and back."""
    total: float
    images_per_second: float
    """Of all ranks."""
    mfu: float | None
    """FLOPs of the model, without what is recomputed, over the peak of the number format; None where that is not known."""


# What a device takes for operations.


def rates_of(device: Device) -> Rates:
    """What was measured, or the shares of the datasheet."""
    if device.rates is not None:
        return device.rates
    work: dict[str, Curve] = {"bytes": ((1.0, SHARES["bytes"] * device.bandwidth),)}
    work["optimizer"] = ((1.0, SHARES["optimizer"] * device.bandwidth),)
    for kind in PRODUCTS:
        for name, peak in device.flops.items():
            # Grouped convolutions do not use the units for matrix products.
            peak = device.flops.get("fp32", peak) if kind == "grouped" else peak
            work[f"{kind} {name}"] = ((1.0, SHARES.get(f"{kind} {name}", SHARES[kind]) * peak),)
    return Rates(work, HOST if device.kind == "cuda" else 0.0, GAPS if device.kind == "cuda" else 1.0)


def rate_at(curve: Curve, size: float) -> float:
    """The rate of an operation of *size*, between the measured ones linear in the logarithms."""
    sizes = [one for one, _ in curve]
    place = bisect.bisect_left(sizes, size)
    if place in (0, len(curve)):
        return curve[min(place, len(curve) - 1)][1]
    (below, low), (above, high) = curve[place - 1 : place + 1]
    share = math.log(size / below) / math.log(above / below)
    return math.exp(math.log(low) + share * math.log(high / low))


@dataclass(frozen=True)
class Seconds:
    """Of a pass: what the device works, and what the host needs to launch it."""

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.device + other.device, self.host + other.host)


class Clock:
    """What operations take on one device."""

    def __init__(self, device: Device) -> None:
        self.device, self.rates = device, rates_of(device)
        self._known: dict[object, Seconds] = {}

    def works(self, works: Sequence[Work], images: float) -> Seconds:
        total = sum((self._work(work, images) for work in works), 0.0)
        count = sum(work.count for work in works)
        if self.device.kind == "cpu":
            return Seconds(self.rates.gaps * (total + self.rates.overhead * count))
        return Seconds(self.rates.gaps * (total + KERNEL * count), self.rates.overhead * count)

    def _work(self, work: Work, images: float) -> float:
        moved, flops, curve = work.moved * images + work.fixed, work.flops * images, self._curve(work)
        if work.kind not in PRODUCTS or not flops:
            return work.count * moved / rate_at(curve, moved) if moved else 0.0
        seconds = max(flops / rate_at(curve, flops / max(1.0, moved)), self.bytes(moved))
        return seconds * work.count

    def part(self, profile: Profile, number: int, what: str, images: float) -> Seconds:
        """Of one pass through one part; equal ones are counted once."""
        part = profile.parts[number]
        key = part.kind if part.path else ("outside", number), what, images
        if key not in self._known:
            works = part.backward_operations if what == "backward" else part.forward_operations
            if what == "recompute" and part.forward_flops:
                # Products that are kept, or needed by no backward pass, are not computed again.
                again = part.recomputed_flops / part.forward_flops
                works = [replace(work, count=work.count * (again if work.kind in PRODUCTS else 1.0)) for work in works]
            self._known[key] = self.works(works, images)
        return self._known[key]

    def got_anew(self, profile: Profile, images: float) -> float:
        """Of memory that the system gives anew in each step, whose micro-batches have so many *images*."""
        most = max(moment.fixed + moment.per_image * images for span in profile.spans for moment in span.peaks)
        return self.rates.fresh * max(0.0, most - KEPT)

    def bytes(self, moved: float, kind: str = "bytes") -> float:
        curve = self.rates.curves.get(kind) or self.rates.curves["bytes"]
        return moved / rate_at(curve, moved) if moved else 0.0

    def _curve(self, work: Work) -> Curve:
        """What was measured of operations like *work*; words of its variant that were not measured are left out."""
        words = work.variant.split()
        names = [rate_name(work.kind, work.format, " ".join(words[:count])) for count in range(len(words), -1, -1)]
        if work.kind in PRODUCTS:
            names += [f"{work.kind} fp32", f"product {work.format}"]
        fp8, bf16 = (self.device.flops.get(name) for name in ("fp8", "bf16"))
        if work.format == "fp8" and names[0] not in self.rates.curves and fp8 and bf16:
            # Calibration does not measure it: as much faster than bf16 as on paper.
            factor = fp8 * SHARES["product fp8"] / (bf16 * SHARES["product"])
            return tuple((size, factor * rate) for size, rate in self.rates.curves["product bf16"])
        return next(self.rates.curves[name] for name in (*names, "bytes") if name in self.rates.curves)


# The clocks.


@dataclass
class Streams:
    """The clocks of one rank."""

    hardware: Hardware
    clock: Clock
    profile: Profile
    images: float
    host: float = 0.0
    compute: float = 0.0
    link: float = 0.0
    bus: float = 0.0
    """Of the copies to the host and back."""
    offload: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    exposed: float = 0.0
    communication: float = 0.0
    ready: dict[object, float] = field(default_factory=dict)

    def run(self, instructions: Iterator[Instruction]) -> None:
        for one in instructions:
            if isinstance(one, Compute):
                self._compute(one)
            elif isinstance(one, Start):
                self._start(one)
            elif isinstance(one, Copy):
                self.bus = max(self.bus, self.compute) + one.size.at(self.images) / reached(self.hardware.host)
                self.ready[one.key] = self.bus
            elif (until := self.ready.pop(one.key, None)) is not None and until > self.compute:
                if isinstance(one.key, tuple) and one.key[0] == COPIED:
                    self.offload += until - self.compute
                else:
                    self.exposed += until - self.compute
                self.compute = until

    def repeat(self, before: Streams, times: int) -> None:
        """Add what happened since *before* another *times*."""
        for name in ("host", "compute", "link", "bus", "exposed", "offload", "communication"):
            now = getattr(self, name)
            setattr(self, name, now + times * (now - getattr(before, name)))
        for what, seconds in self.spent.items():
            self.spent[what] = seconds + times * (seconds - before.spent.get(what, 0.0))

    def _compute(self, one: Compute) -> None:
        if one.part < 0:
            kind = "optimizer" if one.what == "optimizer" else "bytes"
            seconds = Seconds(self.clock.bytes(one.moved, kind))
        else:
            images = self.profile.parts[one.part].kept(self.images)
            seconds = self.clock.part(self.profile, one.part, one.what, images)
        self.host += seconds.host
        before = self.compute
        self.compute = max(self.compute + seconds.device, self.host)
        self.spent[one.what] = self.spent.get(one.what, 0.0) + self.compute - before

    def _start(self, one: Start) -> None:
        seconds = one.collective.seconds(self.hardware)
        copies = self.clock.bytes(one.inline)
        if one.collective.group.ranks == 1:  # a copy within the device
            copies += self.clock.bytes(2 * one.collective.size)
        self.communication += seconds
        if self.hardware.device.kind == "cpu":
            # The threads that communicate and those that compute share the cores.
            self.compute += seconds + copies
            self.exposed += seconds
            self.ready[one.key] = self.compute
            return
        self.link = max(self.link, self.compute) + seconds + copies
        self.ready[one.key] = self.link


def step_time(profile: Profile, config: Config, layout: Layout, hardware: Hardware) -> StepTime:
    """The time of an optimizer step of *config* on *layout*, a mesh on paper, and what it is spent on."""
    mesh, clock = Mesh.of(layout), Clock(hardware.device)
    size = micro_batch(config, mesh.data.ranks, layout.stages)
    count, rest = divmod(config.train.global_batch // mesh.data.ranks, size)
    if config.parallel.strategy == "pipeline":
        streams, bubble = _pipelined(profile, config, layout, mesh, Streams(hardware, clock, profile, size), count, rest)
    else:
        streams, bubble = _accumulated(config, mesh, Streams(hardware, clock, profile, size), count, rest), 0.0
        streams.compute += clock.got_anew(profile, size)
        streams.run(update(profile.tensors, profile, config, mesh))
    total = streams.compute
    batch = config.train.global_batch
    peak = hardware.device.flops.get(FORMATS.get(profile.compute, "fp32"))
    flops = profile.flops_in(size)
    spent = {what: streams.spent.get(what, 0.0) for what in ("forward", "backward", "recompute", "optimizer")}
    return StepTime(
        **spent, communication=streams.communication, exposed=streams.exposed, bubble=bubble, offload=streams.offload,
        total=total,
        images_per_second=batch / total, mfu=flops * batch / (total * hardware.ranks * peak) if peak else None,
    )  # fmt: skip


def least_seconds(profile: Profile, config: Config, hardware: Hardware, casts: bool) -> float:
    """Seconds that no layout on *hardware* undercuts: each rank computes its part of the batch at once and exchanges nothing.

    *casts*: the layout casts weights where they are read, as the plain module of *profile* does; for others work on the weights
    alone is left out. A pipeline takes longer, too: with fewer micro-batches than stages a rank waits for the others, and with
    more it starts more, smaller operations.
    """

    def of_images(works: Sequence[Work]) -> tuple[Work, ...]:
        return tuple(work for work in works if casts or work.flops or work.moved)

    parts = tuple(
        replace(
            part, forward_operations=of_images(part.forward_operations), backward_operations=of_images(part.backward_operations)
        )
        for part in profile.parts
    )
    images, numbers = config.train.global_batch / hardware.ranks, range(len(parts))
    streams = Streams(hardware, Clock(hardware.device), replace(profile, parts=parts), images)
    streams.run(Compute(number, "forward") for number in numbers)
    streams.run(Compute(number, "backward") for number in reversed(numbers))
    return streams.compute


def _accumulated(config: Config, mesh: Mesh, streams: Streams, count: int, rest: int) -> Streams:
    """The clocks after all micro-batches; those between the second and the last take as long as the second."""
    profile, size = streams.profile, streams.images
    sizes = [size] * count + [rest] * bool(rest)
    shards = mesh.shard.ranks if config.parallel.strategy in ("fsdp", "zero2", "zero3") else 1
    # A gradient is added when it has just been computed: what fits a cache is faster than all gradients at once would be.
    added = [Compute(-1, "copy", SUM_BYTES * tensor.numel / shards) for tensor in profile.tensors if tensor.trained]
    for number, images in enumerate(sizes):
        first, last = number == 0, number == len(sizes) - 1
        if number > 1 and not last and images == size:
            continue
        before = replace(streams, spent=dict(streams.spent))
        streams.images = images
        streams.run(iter([Compute(-1, "copy", 13.0 * math.prod(profile.image) * images)]))  # the images as the model gets them
        if profile.teacher is not None:
            streams.profile = profile.teacher
            streams.run(teaching(profile.teacher, config, mesh))
            streams.profile = profile
        streams.run(passes(profile, config, mesh, last))
        if not first:
            streams.run(iter(added))
        if number == 1 and len(sizes) > 3:
            streams.repeat(before, len(sizes) - 3)
    return streams


# Pipelines.


def _pipelined(
    profile: Profile, config: Config, layout: Layout, mesh: Mesh, streams: Streams, count: int, rest: int
) -> tuple[Streams, float]:
    """The clocks of the busiest rank after a step, and how long it waits for other stages."""
    stages, hardware, clock = cut_stages(profile, config, layout), streams.hardware, streams.clock
    placement = stages.memory.placement
    group = Group("stage", placement.ranks, hardware.ranks // placement.ranks)
    busy: dict[int, dict[str, float]] = {rank: {} for rank in range(placement.ranks)}
    end = 0.0
    for batches, images in ((count, streams.images), (1, rest)):
        if batches and images:
            costs = [_stage_seconds(profile, config, clock, shares, images) for shares in stages.shares]
            # Over each cut activations go onwards and gradients back.
            travel = [(0.0, 0.0)] * placement.stages
            for stage in range(placement.stages - 1):
                if placement.rank_of(stage) != placement.rank_of(stage + 1):
                    sizes = stages.costs[stage].sent * images, stages.returned[stage] * images
                    there, back = (Collective("send", size, group).seconds(hardware) if size else 0.0 for size in sizes)
                    travel[stage] = there, back
                    streams.communication += batches * (there + back) / placement.ranks
            end += simulate(config.parallel.schedule, placement, costs, travel, batches, busy)
    rank = max(busy, key=lambda one: sum(busy[one].values()))
    streams.spent, streams.compute = busy[rank], end
    bubble = end - sum(busy[rank].values())
    if mesh.shard.ranks > 1:
        streams.run(iter(sharded_stages(profile, config, stages, mesh, rank)))
    streams.run(update(stages.tensors(placement.numbers(rank)), profile, config, mesh))
    return streams, bubble


def _stage_seconds(
    profile: Profile, config: Config, clock: Clock, shares: Mapping[int, float], images: float
) -> dict[str, float]:  # fmt: skip
    """What a micro-batch takes on a stage with *shares* of the parts, by kind."""
    found: dict[str, float] = dict.fromkeys(("forward", "backward", "recompute"), 0.0)
    for number, share in shares.items():
        for one in (Compute(number, "forward"), *computed(profile, config, number)):
            # The branches of a block that is cut run on all samples.
            kept = profile.parts[number].kept(images) if share == 1.0 else images
            took = clock.part(profile, number, one.what, kept)
            found[one.what] += share * max(took.device, took.host)
    return found


def simulate(
    schedule: str, placement: Placement, seconds: Sequence[Mapping[str, float]], travel: Sequence[tuple[float, float]],
    count: int, busy: dict[int, dict[str, float]],
) -> float:  # fmt: skip
    """Run *count* micro-batches in torch's order; add each rank's seconds to *busy*, and return when the last one ends.

    *seconds* are those of each stage for a micro-batch, *travel* those over the cut behind it, onwards and back.
    """
    last, now = placement.stages - 1, dict.fromkeys(range(placement.ranks), 0.0)
    ended: dict[tuple[int, str, int], float] = {}
    waiting = {rank: deque(passes) for rank, passes in passes_of(schedule, placement, count).items()}
    while any(waiting.values()):
        moved = False
        for rank, queue in waiting.items():
            while queue:
                one = queue[0]
                stage, batch = one.stage, one.micro_batch
                if one.kind == "F":
                    ready = ended.get((stage - 1, "F", batch)) if stage else 0.0
                    ready = None if ready is None else ready + (travel[stage - 1][0] if stage else 0.0)
                elif one.kind == "W":
                    ready = ended.get((stage, "B", batch))
                else:
                    ready = ended.get((stage + 1, "B", batch)) if stage < last else ended.get((stage, "F", batch))
                    ready = None if ready is None else ready + travel[stage][1]
                if ready is None:
                    break
                costs = seconds[stage]
                took = {"forward": costs["forward"]} if one.kind == "F" else {
                    "backward": costs["backward"] / (1 if one.kind == "B" else 2),
                    "recompute": costs["recompute"] if one.kind != "W" else 0.0,
                }  # fmt: skip
                for what, value in took.items():
                    busy[rank][what] = busy[rank].get(what, 0.0) + value
                now[rank] = max(now[rank], ready) + sum(took.values())
                # The stage before goes on after the gradient of what entered.
                ended[stage, {"I": "B", "W": "W"}.get(one.kind, one.kind), batch] = now[rank]
                queue.popleft()
                moved = True
        assert moved, "torch's order of passes cannot run"
    return max(now.values())
