"""What a rank does in a step, in order: what it computes, which collectives it starts, and what it waits for.

Each strategy's program is written down here as the engine runs it. `timing.py` runs it on clocks; `sent` adds up its traffic.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch

from bigvision.config import Config, micro_batch
from bigvision.engine.step import REQUESTS
from bigvision.models.formats import COMPUTE_DTYPES
from bigvision.pipeline.schedules import passes_of
from bigvision.planning.division import Stages, cut_stages, units_of_parts
from bigvision.planning.hardware import Hardware, Link
from bigvision.planning.memory import DDP_BUCKET, shards_teacher
from bigvision.planning.profile import Profile, StateTensor
from bigvision.planning.state import Layout, after_passes, padded_groups, used_map, zero_settings
from bigvision.planning.zero3 import gathered, in_shares

LINK_SHARE = 0.8
"""Of a link's datasheet, what collectives are assumed to reach; nobody has measured it with bigvision."""
COLLECTIVE = 8.4e-6
"""Seconds that a collective takes before anything moves: the base of NCCL's ring in its src/graph/tuning.cc."""
OPTIMIZER_BYTES = {"adamw": 28, "sgd": 20, "lion": 20, "lamb": 44, "adafactor": 24, "muon": 20}
"""Read and written by an update, for a trained value."""
NORM_BYTES, EMA_BYTES, SUM_BYTES = 4, 36, 12
"""For a trained value: the gradient's norm; an update of an average (measured on an H100); adding a micro-batch's gradient."""
NUMBERS = 8 * (3 + len(REQUESTS))
"""Bytes of the numbers that all ranks add up in a step (`engine/step.py: reduce_with`); under ZeRO one fp64 value less."""


# Collectives.


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: *ranks* of them, *stride* apart."""

    name: str
    ranks: int
    stride: int = 1

    def hosts(self, per_host: int) -> tuple[int, int]:
        """(hosts, ranks on each of them)."""
        there = max(1, min(self.ranks, per_host // self.stride))
        return -(-self.ranks // there), there


@dataclass(frozen=True)
class Collective:
    kind: str
    """all_gather, reduce_scatter, all_reduce, send."""
    size: float
    """Bytes of the whole tensor: what is gathered, what is reduced, what is sent."""
    group: Group
    calls: int = 1

    @property
    def sent(self) -> float:
        """Bytes that each rank sends, in a ring."""
        if self.kind == "send":
            return self.size
        ranks = self.group.ranks
        return self.size * (ranks - 1) / ranks * (2 if self.kind == "all_reduce" else 1)

    def seconds(self, hardware: Hardware) -> float:
        """As NCCL does it: rings within the hosts, one through each link between them; an all-reduce in trees between hosts."""
        hosts, there = self.group.hosts(hardware.per_host)
        within, between = hardware.within, hardware.between
        if self.kind == "send":
            link = within if hosts == 1 else between
            return link.latency + self.size / _speed(link)
        if self.group.ranks == 1:
            return 0.0
        if hardware.device.kind == "cpu" and self.kind == "reduce_scatter":
            # gloo has none: torch reduces all and takes a part.
            return Collective("all_reduce", self.size, self.group, self.calls).seconds(hardware)
        speed = _speed(within) if hosts == 1 else _speed(between) * there
        if hosts > 1 and there > 1:
            speed = min(speed, _speed(within))
        steps = (there - 1) * within.latency * max(1, hosts if self.kind != "all_reduce" else 1)
        steps += (
            between.latency * (math.ceil(math.log2(hosts)) if self.kind == "all_reduce" else hosts - 1) if hosts > 1 else 0.0
        )
        steps *= 2 if self.kind == "all_reduce" else 1
        start = COLLECTIVE if hardware.device.kind == "cuda" else 0.0
        return self.sent / speed + self.calls * (steps + start)


def _speed(link: Link) -> float:
    return link.bandwidth * (1.0 if link.measured else LINK_SHARE)


# The program of a rank.


@dataclass(frozen=True)
class Compute:
    part: int
    """Its place among the profile's parts; -1 computes *moved* bytes of copies alone."""
    what: str
    """forward, backward, recompute, optimizer or copy."""
    moved: float = 0.0


@dataclass(frozen=True)
class Start:
    """Begin a collective, behind all that was computed and begun before."""

    key: object
    collective: Collective
    inline: float = 0.0
    """Bytes that the link's stream copies first."""


@dataclass(frozen=True)
class Wait:
    key: object


Instruction = Compute | Start | Wait


@dataclass(frozen=True)
class Mesh:
    """The groups of a layout."""

    data: Group
    shard: Group
    replicate: Group
    everyone: Group

    @classmethod
    def of(cls, layout: Layout) -> Mesh:
        data = layout.ranks // layout.stages
        shards = data // layout.replicas
        return cls(
            Group("data", data), Group("shard", shards), Group("replicate", layout.replicas, shards), Group("all", layout.ranks)
        )


def gathered_bytes(tensors: Iterable[StateTensor], shards: int, compute: torch.dtype) -> float:
    """Of the parameters among *tensors* that ``fully_shard`` gathers, padded to equal shards of dimension 0."""
    total = 0.0
    for tensor in tensors:
        if not tensor.buffer and not tensor.whole:
            itemsize = compute.itemsize if compute != torch.float32 else tensor.dtype.itemsize
            total += _padded(tensor.shape, shards) * itemsize
    return total


def scattered_bytes(tensors: Iterable[StateTensor], shards: int, config: Config) -> float:
    """Of the gradients of *tensors*, as they travel, padded likewise."""
    trained = [tensor for tensor in tensors if tensor.trained and not tensor.whole]
    return float(sum(_padded(tensor.shape, shards) for tensor in trained) * reduced_itemsize(config))


def reduced_itemsize(config: Config) -> int:
    """Bytes of one value of a gradient that travels."""
    return COMPUTE_DTYPES[config.parallel.reduce].itemsize


def _padded(shape: tuple[int, ...], shards: int) -> int:
    rows, rest = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    return -(-rows // shards) * shards * rest


def trained_values(tensors: Iterable[StateTensor], whole: bool | None = None) -> int:
    """Trained values of *tensors*; *whole*: those that `fully_shard` leaves whole, or not."""
    return sum(tensor.numel for tensor in tensors if tensor.trained and (whole is None or tensor.whole == whole))


def _averaged(size: int, group: Group) -> list[Instruction]:
    """Gradients that are averaged after the passes, while nothing else runs."""
    if not size or group.ranks == 1:
        return []
    return [Start("averaged", Collective("all_reduce", float(size), group, -(-size // DDP_BUCKET))), Wait("averaged")]


def passes(profile: Profile, config: Config, mesh: Mesh, last: bool) -> Iterator[Instruction]:
    """One micro-batch, forward and backward, of a model that is not cut into stages."""
    strategy = config.parallel.strategy
    if strategy == "fsdp" and mesh.data.ranks > 1:
        yield from _fsdp(profile, config, mesh, last)
    elif strategy == "zero3":
        yield from _zero3(profile, config, mesh)
    else:
        yield from _whole(profile, config, mesh, last)


def teaching(teacher: Profile, config: Config, mesh: Mesh) -> Iterator[Instruction]:
    """What a *teacher* adds to a micro-batch: a forward pass. The numbers of parts are those of its profile."""
    strategy = "fsdp" if shards_teacher(config.parallel.strategy, mesh.data.ranks) else "ddp"
    held = replace(config, parallel=replace(config.parallel, strategy=strategy, recompute="none"))
    # `fully_shard` leaves what lies outside of blocks gathered by a forward pass, and no backward pass frees it: it is neither
    # gathered, waited for nor copied again in later steps.
    known = 3 if strategy == "fsdp" else 0
    for one in islice(passes(teacher, held, mesh, last=False), known, None):
        if isinstance(one, Compute) and one.what == "backward":
            return
        if isinstance(one, Start) and isinstance(one.key, tuple) and one.key[0] == "backward":
            return  # it would be gathered ahead of its backward pass
        yield one


def computed(profile: Profile, config: Config, number: int) -> Iterator[Compute]:
    """The backward pass of a part."""
    if config.parallel.recompute != "none" and profile.parts[number].path:
        yield Compute(number, "recompute")
    yield Compute(number, "backward")


def _whole(profile: Profile, config: Config, mesh: Mesh, last: bool) -> Iterator[Instruction]:
    """ddp, zero1 and zero2: gradients are reduced in buckets while the backward pass goes on."""
    numbers, strategy = range(len(profile.parts)), config.parallel.strategy
    yield from (Compute(number, "forward") for number in numbers)
    # What DeepSpeed has in one bucket travels whole, and each rank keeps its share.
    reduces = mesh.data.ranks > 1 and (last or strategy == "zero2") and not after_passes(config, profile.compute)
    itemsize = reduced_itemsize(config)
    bucket = DDP_BUCKET / 4 if strategy in ("ddp", "fsdp") else min(50_000_000, max(1, trained_values(profile.tensors)))
    waiting = started = 0
    for number in reversed(numbers):
        yield from computed(profile, config, number)
        waiting += trained_values(profile.parts[number].tensors)
        if reduces and waiting and (waiting >= bucket or number == 0):
            calls = max(1, round(waiting / bucket))
            yield Start(("bucket", started), Collective("all_reduce", float(itemsize * waiting), mesh.data, calls))
            waiting, started = 0, started + 1
    yield from (Wait(("bucket", number)) for number in range(started))


def _fsdp(profile: Profile, config: Config, mesh: Mesh, last: bool) -> Iterator[Instruction]:
    """`fully_shard`: each unit is gathered one unit ahead, forward and again backward; gradients are scattered behind it."""
    parts, shards = profile.parts, mesh.shard.ranks
    units = units_of_parts(profile, config)
    entered, left = {unit[0]: place for place, unit in enumerate(units)}, {unit[-1]: place for place, unit in enumerate(units)}
    tensors = [[tensor for number in unit for tensor in parts[number].tensors] for unit in units]
    tensors.append([tensor for part in parts if not part.path for tensor in part.tensors])
    outside = len(units)
    again, scatters = config.parallel.reshard == "forward", last or config.parallel.scatter == "each"
    gathers = [gathered_bytes(those, shards, profile.compute) for those in tensors]

    def gather(unit: int, when: str) -> Start:
        # Cast, and copied together.
        return Start((when, unit), Collective("all_gather", gathers[unit], mesh.shard), 5 * gathers[unit] / shards)

    def arrived(unit: int, when: str) -> Iterator[Instruction]:
        yield Wait((when, unit))
        yield Compute(-1, "copy", 2.0 * gathers[unit])

    def scatter(unit: int) -> Iterator[Instruction]:
        size = scattered_bytes(tensors[unit], shards, config)
        if not size:
            return
        yield Compute(-1, "copy", size * (1 + profile.compute.itemsize / reduced_itemsize(config)))
        yield Start(("scatter", unit), Collective("reduce_scatter", size, mesh.shard))
        if last and mesh.replicate.ranks > 1:
            yield Start(("replicas", unit), Collective("all_reduce", size / shards, mesh.replicate))

    yield gather(outside, "forward")
    yield from arrived(outside, "forward")
    if units:
        yield gather(0, "forward")
    for number in range(len(parts)):
        if (unit := entered.get(number)) is not None:
            yield from arrived(unit, "forward")
            if unit + 1 < len(units):
                yield gather(unit + 1, "forward")
        yield Compute(number, "forward")
    if again and units:
        yield gather(len(units) - 1, "backward")
    for number in reversed(range(len(parts))):
        if (unit := left.get(number)) is not None and again:
            yield from arrived(unit, "backward")
            if unit:
                yield gather(unit - 1, "backward")
        yield from computed(profile, config, number)
        if scatters and (unit := entered.get(number)) is not None:
            yield from scatter(unit)
    if scatters:
        yield from scatter(outside)
    for unit in range(outside + 1):
        yield Wait(("scatter", unit))
        yield Wait(("replicas", unit))


def _zero3(profile: Profile, config: Config, mesh: Mesh) -> Iterator[Instruction]:
    """DeepSpeed gathers the parameters of a module before it runs, in both passes, and scatters its gradients."""
    parts, group = profile.parts, mesh.data
    numbers, knobs = range(len(parts)), zero_settings(profile, config, group.ranks)
    sizes = gathered(profile, group.ranks, knobs, config.parallel.recompute != "none").sizes
    for backward, order in ((False, numbers), (True, reversed(numbers))):
        ordered = list(order)
        yield Start((backward, ordered[0]), Collective("all_gather", sizes[backward, ordered[0]], group))
        for place, number in enumerate(ordered):
            yield Wait((backward, number))
            if place + 1 < len(ordered):
                following = ordered[place + 1]
                yield Start((backward, following), Collective("all_gather", sizes[backward, following], group))
            if not backward:
                yield Compute(number, "forward")
                continue
            yield from computed(profile, config, number)
            trained = [tensor.numel for tensor in parts[number].tensors if tensor.trained]
            if gradients := reduced_itemsize(config) * sum(in_shares(numel, group.ranks) for numel in trained):
                yield Start(("scatter", number), Collective("reduce_scatter", float(gradients), group))
    yield from (Wait(("scatter", number)) for number in numbers)


def update(tensors: Sequence[StateTensor], profile: Profile, config: Config, mesh: Mesh) -> Iterator[Instruction]:
    """After the passes: what is averaged then, the numbers of the step, the optimizer, the average of the weights.

    *tensors*: of a pipeline those of a rank's stages, else all.
    """
    strategy, data = config.parallel.strategy, mesh.data
    sharded = mesh.shard.ranks > 1 and strategy in ("fsdp", "pipeline")
    if sharded:
        yield from _averaged(reduced_itemsize(config) * trained_values(tensors, whole=True), data)
    elif strategy == "pipeline":
        yield from _averaged(reduced_itemsize(config) * trained_values(tensors), data)
    elif after_passes(config, profile.compute):
        yield from _averaged(reduced_itemsize(config) * sum(padded_groups(profile, data.ranks)), data)
    zero = strategy.startswith("zero")
    yield from _averaged(used_map(profile, strategy, data.ranks), data)
    if mesh.everyone.ranks > 1:
        yield Start("numbers", Collective("all_reduce", NUMBERS - 8 * zero, mesh.everyone))
        yield Wait("numbers")
    if zero and data.ranks > 1 and not after_passes(config, profile.compute):
        # The square of the norm of each group, fp32, or fp64 under stage 3 unless the CPU steps. In fp16, and below stage 3 in
        # bf16 too, whether a gradient is not finite.
        groups, compute, third = len(profile.groups), profile.compute, strategy == "zero3"
        flag = int(compute == torch.float16 or (compute == torch.bfloat16 and not third))
        size = flag + (8 if third and config.parallel.offload == "none" else 4) * groups
        yield Start("norm", Collective("all_reduce", size, data, flag + groups))
        yield Wait("norm")
    trained = float(trained_values(tensors))
    if sharded:
        trained = trained_values(tensors, whole=False) / mesh.shard.ranks + trained_values(tensors, whole=True)
    elif zero:
        trained /= data.ranks
    bytes_each = OPTIMIZER_BYTES.get(config.optim.name, 28) + NORM_BYTES
    yield Compute(-1, "optimizer", trained * bytes_each)
    if config.ema.decay is not None:
        yield Compute(-1, "copy", trained * EMA_BYTES / config.ema.every)
    if zero and data.ranks > 1:
        size = float(sum(padded_groups(profile, data.ranks)) * profile.compute.itemsize)
        if strategy == "zero3":  # what it keeps whole
            kept = zero_settings(profile, config, data.ranks)["stage3_param_persistence_threshold"]
            whole = [tensor for tensor in profile.tensors if not tensor.buffer and tensor.numel <= kept]
            size = float(sum(in_shares(tensor.numel, data.ranks) * tensor.computes.itemsize for tensor in whole))
        yield Start("weights", Collective("all_gather", size, data))
        yield Wait("weights")


# Pipelines.


def sharded_stages(profile: Profile, config: Config, stages: Stages, mesh: Mesh, place: int) -> list[Instruction]:
    """What FSDP exchanges within the stages of the rank *place* of a pipeline in a step.

    A block is gathered by a pass that does not find it gathered. A forward pass frees it again, a backward pass does not;
    gradients are scattered after the last micro-batch.
    """
    shards, placement = mesh.shard.ranks, stages.memory.placement
    size = micro_batch(config, mesh.data.ranks, placement.ranks)
    count = max(1, config.train.global_batch // mesh.data.ranks // size)
    order = passes_of(config.parallel.schedule, placement, count)[place]
    found: list[Instruction] = []
    for stage in placement.numbers(place):
        units, tensors = stages.units[stage], stages.tensors([stage])
        gathers, gathered = 0, False
        for one in (one for one in order if one.stage == stage and one.kind != "W"):
            gathers += not gathered
            gathered = one.kind != "F" or config.parallel.reshard == "never"
        outside = gathered_bytes(units[-1], shards, profile.compute)
        blocks = gathers * (gathered_bytes(tensors, shards, profile.compute) - outside)
        scattered = scattered_bytes(tensors, shards, config)
        exchanged = [Collective("all_gather", blocks + outside, mesh.shard, gathers * (len(units) - 1) + 1)]
        exchanged.append(Collective("reduce_scatter", scattered, mesh.shard, len(units)))
        if mesh.replicate.ranks > 1:
            exchanged.append(Collective("all_reduce", scattered / shards, mesh.replicate, len(units)))
        for number, one in enumerate(exchanged):
            found += [Start((stage, number), one), Wait((stage, number))]
    return found


# Traffic.


def sent(profile: Profile, config: Config, layout: Layout, rank: int = 0) -> dict[tuple[str, str], float]:
    """Bytes that *rank* sends in a step, by (kind of collective, group of ranks)."""
    mesh = Mesh.of(layout)
    share = config.train.global_batch // mesh.data.ranks
    size = micro_batch(config, mesh.data.ranks, layout.stages)
    found: dict[tuple[str, str], float] = {}

    def add(instructions: Iterator[Instruction] | list[Instruction], times: int = 1) -> None:
        for one in instructions:
            if isinstance(one, Start) and one.collective.group.ranks > 1:
                key = one.collective.kind, one.collective.group.name
                found[key] = found.get(key, 0.0) + one.collective.sent * times

    tensors = list(profile.tensors)
    if config.parallel.strategy == "pipeline":
        plan, key = cut_stages(profile, config, layout), ("send", "stage")
        placement, place = plan.memory.placement, rank // mesh.data.ranks
        here = placement.numbers(place)
        tensors = plan.tensors(here)
        for stage in here:
            # Activations onwards, gradients back.
            if stage + 1 < placement.stages and placement.rank_of(stage + 1) != place:
                found[key] = found.get(key, 0.0) + plan.costs[stage].sent * share
            if stage and placement.rank_of(stage - 1) != place and plan.returned[stage - 1]:
                found[key] = found.get(key, 0.0) + plan.returned[stage - 1] * share
        if mesh.shard.ranks > 1:
            add(sharded_stages(profile, config, plan, mesh, place))
    else:
        count = -(-share // size)
        if profile.teacher is not None:
            add(teaching(profile.teacher, config, mesh), count)
        if count > 1:
            add(passes(profile, config, mesh, False), count - 1)
        add(passes(profile, config, mesh, True))
    add(update(tensors, profile, config, mesh))
    return found
