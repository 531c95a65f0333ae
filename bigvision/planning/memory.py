"""How many bytes each rank needs: its share of the state, and its peak in a step.

Which share a rank has follows from its place in the mesh alone, so the ranks of a mesh fall into few groups that need the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from bigvision import muon
from bigvision.config import Config
from bigvision.engine.state import BUCKET
from bigvision.models.formats import COMPUTE_DTYPES
from bigvision.pipeline.schedules import passes_of
from bigvision.planning.division import Stages, cut_stages, units_of_parts
from bigvision.planning.profile import Profile
from bigvision.planning.recorder import Moment, Span
from bigvision.planning.state import (
    MASTER,
    Layout,
    State,
    after_passes,
    averages_of,
    local_share,
    padded_groups,
    scalars_of,
    share_of,
    state_of,
    zero_settings,
)
from bigvision.planning.zero3 import gathered

AT_ONCE = 500_000_000
"""Gradients that DeepSpeed exchanges in one piece after the backward passes."""
DDP_BUCKET = 25 << 20
"""Bytes of DistributedDataParallel's buckets."""
WORKSPACE = {"cpu": 0, "cuda": 150_000_000}
"""Bytes that libraries keep in torch's allocator: what an eager ViT-L and a ResNet-50 needed on an H100 beyond all else."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank needs on its device."""

    rank: int
    parameters: int
    """What it holds of the model between steps: master weights, and weights in the compute type where those are kept."""
    buffers: int
    """Of the model, and how running statistics were before the step."""
    optimizer: int
    ema: int
    gradients: int
    """When the backward pass is over."""
    buckets: int
    """What is kept for the exchange of gradients or parameters between steps."""
    received: int
    """Into what torch receives activations and gradients of other pipeline stages: kept for all micro-batches of a step."""
    scalars: int
    """Loss scale, mean and deviation of images, and the numbers of the last step."""
    images: int
    """The images and targets of a micro-batch."""
    host: int
    """In the host's memory: offloaded state."""
    working: int
    """At the peak: gathered or cast weights, and what the operations of a part need while they run."""
    activations: int
    """At the peak: what is kept for the backward pass."""
    boundary: int
    """At the peak: what crosses between pipeline stages."""
    peak: int
    """The most that is allocated at a time."""
    teacher: int = 0
    """What it holds of the task's teacher."""
    pinned: int = 0
    """In the host's memory: activations that wait there for the backward pass."""

    @property
    def state(self) -> int:
        """What is held between steps."""
        of_model = self.parameters + self.buffers + self.optimizer + self.ema
        return of_model + self.buckets + self.received + self.scalars + self.teacher


def rank_memory(profile: Profile, config: Config, layout: Layout, rank: int) -> Memory:
    """What *rank* of *layout* needs for the step of *profile*, which is of the same *config*."""
    stage, _, shard = layout.place(rank)
    tensors = list(profile.tensors)
    if layout.strategy == "pipeline":
        plan = cut_stages(profile, config, layout)
        mine = set(plan.memory.placement.numbers(stage))
        tensors = plan.tensors(mine)
    state = state_of(profile, config, layout, tensors, shard)
    buffers = sum(t.nbytes * (2 if t.running else 1) for t in tensors if t.buffer)
    ema = 0
    if config.ema.decay is not None:
        # A counter of updates; averages lie where what they follow lies.
        masters = averages_of(profile, layout, shard, tensors)
        ema = 8 + sum(tensor.nbytes for tensor in tensors if tensor.buffer and tensor.averaged)
        if layout.strategy.startswith("zero") and config.parallel.offloads_state:
            state = replace(state, host=state.host + masters)
        else:
            ema += masters
    images = round(layout.micro_batch(config) * (math.prod(profile.image) * (1 + MASTER) + profile.targets))
    last = layout.strategy != "pipeline" or layout.stages * layout.stages_per_rank - 1 in mine
    scalars = scalars_of(config, layout, profile, computes_loss=last)
    teacher = _Teacher(profile.teacher, config, layout, shard) if profile.teacher is not None else None
    held = state.parameters + buffers + state.optimizer + ema + state.buckets + scalars + images + WORKSPACE[profile.device]
    held += teacher.held if teacher else 0
    if layout.strategy == "pipeline":
        received = round(config.train.global_batch // layout.data_ranks * sum(plan.received(stage) for stage in mine))
        # Where backward passes are taken apart torch leaves the gradients of what it received beside it. Those of what came
        # from a stage of the same rank are counted there.
        placement = plan.memory.placement
        for one in passes_of(config.parallel.schedule, placement, plan.memory.count)[stage]:
            if one.kind == "I" and one.stage and placement.rank_of(one.stage - 1) != stage:
                received += round(plan.memory.micro_batch * plan.returned[one.stage - 1])
        stepped = _stepped(profile, config, layout, state.gradients)
        return _stages_memory(rank, plan, mine, state, buffers, ema, received, scalars, images, held - images, stepped)
    step = _Step(profile, config, layout, state)
    most = step.peak(shard)
    after = held + max(step.update(), step.averaging(ema))
    total = most.total
    if teacher is not None:
        kept = 0 if state.buckets else state.gradients * step.repeats
        total = max(total + teacher.told, teacher.most + kept)
    return Memory(
        rank, state.parameters, buffers, state.optimizer, ema, state.gradients, state.buckets, 0, scalars, images, state.host,
        round(most.working), round(most.activations), 0, round(max(held + total, after)), teacher.held if teacher else 0,
        round(sum(part.leaves.at(step.images) for part in profile.parts)),
    )  # fmt: skip


def _stages_memory(
    rank: int, plan: Stages, stages: set[int], state: State, buffers: int, ema: int, received: int, scalars: int, images: int,
    held: int, stepped: float,
) -> Memory:  # fmt: skip
    """Of a rank with some *stages* of *plan*, whose state is known."""
    memory = plan.memory
    working, activations, boundary = (
        round(sum(of(stage, plan.costs[stage]) for stage in stages))
        for of in (memory.working, memory.activations, memory.boundary)
    )
    # All images of a step are on the device at once, but on the first stage alone.
    images = images * memory.count if 0 in stages else 0
    return Memory(
        rank, state.parameters, buffers, state.optimizer, ema, state.gradients, state.buckets, received, scalars, images,
        state.host, working, activations, boundary,
        held + images + state.gradients + max(working + activations + boundary, round(stepped)),
    )  # fmt: skip


def _stepped(profile: Profile, config: Config, layout: Layout, gradients: int) -> float:
    """Bytes that the optimizer's step allocates on a rank with so many bytes of *gradients*."""
    if not profile.update or config.parallel.offloads_state:
        return 0.0
    if config.optim.name == "muon" and layout.strategy != "ddp" and layout.shards > 1:
        # Rows of matrices in bf16: a rank's own, as they are sent and as they arrive, and their results before and after that.
        return max(profile.update, 5 * 2 * min(gradients / MASTER, muon.BUCKET))
    if config.optim.name in ("adafactor", "muon"):  # one whole matrix after another
        return profile.update
    if layout.strategy.startswith("zero"):
        return profile.update / layout.ranks
    return profile.update * gradients / (MASTER * sum(part.trained for part in profile.parts))


@dataclass(frozen=True)
class _Most:
    """What is allocated at the peak of a step, beside what is held between steps and the images."""

    activations: float
    working: float
    total: float


class _Step:
    """What the passes of a step and its update allocate on a rank."""

    def __init__(self, profile: Profile, config: Config, layout: Layout, state: State) -> None:
        self.profile, self.config, self.layout, self.state = profile, config, layout, state
        self.images = layout.micro_batch(config)
        share = config.train.global_batch // layout.data_ranks
        self.repeats = -(-share // self.images) > 1
        """Whether gradients of earlier micro-batches are there already."""
        self.trained = sum(part.trained for part in profile.parts)
        self.after_passes = after_passes(config, profile.compute)
        self.reduced = COMPUTE_DTYPES[config.parallel.reduce].itemsize
        """Bytes of a value of a gradient that travels."""
        self.copied = self.reduced / MASTER if self.reduced < MASTER else 0.0
        """How large a copy of fp32 gradients travels; without one they travel themselves."""

    def peak(self, shard: int) -> _Most:
        """The most of the passes of the step's last micro-batch."""
        extra = self._extra(shard)
        found = [(moment, more) for place, span in enumerate(self.profile.spans) for moment, more in extra(place, span)]
        moment, more = max(found, key=lambda one: self.live(one[0]) + one[1])
        return _Most(moment.per_image * self.images, moment.fixed + more, self.live(moment) + more)

    def live(self, moment: Moment) -> float:
        return moment.fixed + moment.per_image * self.images

    def _extra(self, shard: int) -> Callable[[int, Span], Iterator[tuple[Moment, float]]]:
        """The moments of a span with what a strategy allocates beside them."""
        strategy, ranks = self.layout.strategy, self.layout.ranks
        if strategy == "fsdp" and ranks > 1:
            return _Gathered(self, shard).moments
        if strategy.startswith("zero"):
            return _Partitioned(self).moments
        whole = float(self.state.gradients)
        if strategy == "ddp" and ranks > 1:
            # Gradients of earlier micro-batches are no views of buckets; each becomes one in the last backward pass.
            # What travels may be a copy of a bucket.
            return lambda _, span: (
                (moment, max(0.0, whole - moment.gradients) * self.repeats + self.copied * min(moment.gradients, DDP_BUCKET))
                for moment in span.peaks
            )
        return lambda _, span: ((moment, whole if self.repeats else moment.gradients) for moment in span.peaks)

    def update(self) -> float:
        """Gradients, and what the optimizer's step allocates."""
        strategy = self.layout.strategy
        stepped = _stepped(self.profile, self.config, self.layout, self.state.gradients)
        if self.after_passes:
            return MASTER * min(self.trained, AT_ONCE) * (1 + self.copied) + stepped
        if strategy in ("zero1", "zero2"):
            # The share of the gradients, from which the flat gradient is made; it is not smaller than all of zero1's.
            part = MASTER * sum(padded_groups(self.profile, self.layout.ranks)) / self.layout.ranks
            return (self.state.gradients if strategy == "zero1" else part) + part + stepped
        return (0.0 if self.state.buckets else float(self.state.gradients)) + stepped

    def averaging(self, ema: int) -> float:
        """What an update of the EMA allocates: the differences of one bucket."""
        return min(ema, MASTER * BUCKET)


def shards_teacher(strategy: str, ranks: int) -> bool:
    """Whether each rank has a share of the task's teacher; else it has all of it, and casts its weights where they are read."""
    return strategy in ("fsdp", "zero3") and ranks > 1


class _Teacher:
    """What a rank holds of a frozen teacher, and needs for its pass, which comes before the student's."""

    def __init__(self, profile: Profile, config: Config, layout: Layout, shard: int) -> None:
        layout = replace(layout, strategy="fsdp" if shards_teacher(layout.strategy, layout.ranks) else "ddp")
        step = _Step(profile, config, layout, State())
        stored = {one.name: one.numel if one.buffer else local_share(layout, one, shard)[0] for one in profile.tensors}
        self.held = sum(stored[one.name] * one.dtype.itemsize for one in profile.tensors)
        # It gets images of its own size and normalisation.
        self.most = step.peak(shard).total + MASTER * math.prod(profile.image) * step.images
        self.told = step.live(profile.spans[-1].end)
        """What it returns, which the student's loss needs."""


class _Gathered:
    """fsdp: gathered weights, those that are on their way, and gradients on their way back, all by units."""

    def __init__(self, step: _Step, shard: int) -> None:
        profile, layout, parallel = step.profile, step.layout, step.config.parallel
        self.step, self.spans = step, profile.spans
        self.keeps, self.late = parallel.reshard == "never", parallel.scatter == "last" and step.repeats
        self.units = units_of_parts(profile, step.config)
        outside = [number for number, part in enumerate(profile.parts) if not part.path]
        self.weights: list[float] = []
        """Of each unit, gathered; last of what lies outside of blocks."""
        self.shards: list[float] = []
        """Of each unit's gradients, this rank's."""
        for unit in (*self.units, outside):
            tensors = [tensor for number in unit for tensor in profile.parts[number].tensors]
            cut = [tensor for tensor in tensors if not tensor.buffer and not tensor.whole]
            chunks = [(share_of(tensor, layout.shards, shard)[0], tensor) for tensor in cut]
            self.weights.append(sum(chunk * layout.shards * tensor.computes.itemsize for chunk, tensor in chunks))
            self.shards.append(sum(MASTER * chunk for chunk, tensor in chunks if tensor.trained))
        self.gradients = [shards * layout.shards * step.reduced / MASTER for shards in self.shards]
        """Of each unit, padded, in the type in which they travel."""
        self.whole = sum(t.numel * MASTER for t in profile.tensors if t.whole and t.trained)
        self.made: list[tuple[float, float]] = []
        """Bytes of gradients that the backward passes before each span have made: of its unit, and outside of blocks."""
        of_unit = {number: place for place, unit in enumerate(self.units) for number in range(unit[0], unit[-1] + 1)}
        made = [0.0] * len(self.weights)
        for span in profile.spans:
            self.made.append((made[of_unit.get(span.part, -1)], made[-1]))
            if span.backward:
                unit = of_unit[span.part] if profile.parts[span.part].path else -1
                made[unit] += span.end.gradients - span.begin.gradients

    def moments(self, place: int, span: Span) -> Iterator[tuple[Moment, float]]:
        begin, part = self.spans[place].begin.gradients, span.part
        # What lies between two blocks of one unit runs while that is gathered.
        here = [number for number, unit in enumerate(self.units) if unit[0] <= part <= unit[-1]]
        before = [number for number, unit in enumerate(self.units) if unit[-1] < part]
        after = [number for number, unit in enumerate(self.units) if unit[0] > part]
        single = self.step.layout.shards == 1
        held = self.weights[-1] + sum(self.weights[number] for number in (before + here if self.keeps else here))
        if not span.backward:
            coming = self.weights[after[0]] if after else 0.0
            copied = sum(self.weights[number] for number in here or before[-1:])
            held += 0.0 if single else coming + copied
            for moment in span.peaks:
                yield moment, held + self._scattered([])
            return
        # What lies outside of blocks keeps its gradients, and the weights, to the end of the pass.
        mine, outside = self.made[place]
        mine = mine if here else 0.0
        # A replica on a single rank gathers nothing: what is prefetched gets memory when it is used.
        coming = self.weights[before[-1]] if before and not (self.keeps or single) else 0.0
        leaving = self.gradients[after[0]] if after else 0.0
        done = self._scattered(after)
        for moment in span.peaks:
            yield moment, held + coming + leaving + outside + done + mine + moment.gradients - begin
        held -= sum(self.weights[number] for number in here)
        if here and self.units[here[0]][0] == part:
            unit, mine = here[0], mine + span.end.gradients - begin
            # gloo reduces a copy, when the unit's own gradients are gone.
            mine = max(mine, self.gradients[unit]) if self.step.profile.device == "cpu" and not single else mine
            yield span.end, held + coming + outside + done + mine + self.gradients[unit] + self.shards[unit]
        elif place == len(self.spans) - 1:
            total = outside + span.end.gradients - begin
            yield span.end, total + done + self.gradients[-1] + leaving

    def _scattered(self, done: list[int]) -> float:
        """This rank's gradients when those of the units *done* have been exchanged."""
        if self.late:
            return sum(self.gradients)
        return (sum(self.shards) if self.step.repeats else sum(self.shards[number] for number in done)) + self.whole


class _Partitioned:
    """DeepSpeed: gradients, the bucket in which they are exchanged, and the weights that stage 3 gathers."""

    def __init__(self, step: _Step) -> None:
        self.step, layout = step, step.layout
        knobs = zero_settings(step.profile, step.config, layout.ranks)
        self.stage, self.size = layout.strategy, knobs["reduce_bucket_size"]
        # Beside those in half precision stage 1 keeps sums in fp32 from one micro-batch to the next, of which buckets are made.
        self.sums = self.stage == "zero1" and step.profile.compute.itemsize < MASTER
        self.bucket = 0 if step.after_passes else MASTER * self.size * (2 if knobs["overlap_comm"] else 1)
        self.wider = MASTER / step.profile.compute.itemsize
        self.share = 1 / layout.ranks
        self.whole = MASTER * step.trained * (self.share if self.stage == "zero2" else 1.0)
        if self.stage == "zero3":
            self.weights = gathered(step.profile, layout.ranks, knobs, step.config.parallel.recompute != "none").held

    def moments(self, place: int, span: Span) -> Iterator[tuple[Moment, float]]:
        return self._gathered(place, span) if self.stage == "zero3" else self._replicated(place, span)

    def _replicated(self, place: int, span: Span) -> Iterator[tuple[Moment, float]]:
        begin = self.step.profile.spans[place].begin.gradients
        exchanged = self.bucket * span.backward
        for moment in span.peaks:
            if self.stage == "zero2":
                gradients = (moment.gradients - begin) + begin * self.wider * self.share
            else:
                gradients = moment.gradients  # in fp32 they are kept between steps, where that is another type
            if self.sums:
                gradients += self.whole * (self.step.repeats and not self.step.after_passes)
            yield moment, exchanged + (self.whole if self.step.repeats and not self.sums else gradients)

    def _gathered(self, place: int, span: Span) -> Iterator[tuple[Moment, float]]:
        spans = self.step.profile.spans
        begin, weights = spans[place].begin.gradients, self.weights[place]
        for moment in span.peaks:
            yield moment, weights + moment.gradients - begin
        full = self.size * self.step.profile.compute.itemsize
        last = place == len(spans) - 1
        if span.backward and (last or begin // full < span.end.gradients // full):
            # What is exchanged is a flat copy; gloo makes another one.
            copies = 2 if self.step.profile.device == "cpu" else 1
            yield span.end, weights * (not last) + copies * self.step.reduced * min(self.size, self.step.trained)


def worst(profile: Profile, config: Config, layout: Layout) -> Memory:
    """Of the rank that needs the most."""
    return max((rank_memory(profile, config, layout, rank) for rank in representatives(layout)), key=lambda m: m.peak)


def representatives(layout: Layout) -> Iterator[int]:
    """A rank of each group that needs the same: of each stage the first one, and the last, which may have smaller shards."""
    for stage in range(layout.stages):
        first = stage * layout.data_ranks
        yield from dict.fromkeys((first, first + layout.shards - 1))
