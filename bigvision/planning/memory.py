"""How many bytes each rank needs: its share of the state, exactly, and its peak in a step.

State is every tensor that a rank's engine holds between two steps, counted once for each storage: parameters, buffers, masters,
moments, averages, buckets, what torch's pipelines receive into, and the scalars beside them, with the numbers of the last step,
which wait there to be read. The batch and the images made of it are counted apart, since they come from the data. Not counted
is the map of unused parameters of DistributedDataParallel, 8 bytes for each parameter of a model that has some.

Which share a rank has follows from its place in the mesh alone, so the ranks of a mesh fall into few groups that need the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from bigvision import muon
from bigvision.config import SPLIT_BACKWARD, Config, OptimConfig, deepspeed_settings, micro_batch
from bigvision.engine.state import BUCKET
from bigvision.engine.step import REQUESTS
from bigvision.errors import UserError
from bigvision.models import find_blocks
from bigvision.models.tracing import Cost
from bigvision.optim import state_layout
from bigvision.pipeline import Placement, StageMemory
from bigvision.pipeline.schedules import passes_of
from bigvision.pipeline.stages import cut
from bigvision.planning.profile import Profile, StateTensor
from bigvision.planning.recorder import Moment, Span
from bigvision.planning.zero3 import gathered

MASTER = 4
"""Bytes of an fp32 value."""
COUNTERS = {"adamw": "parameter", "adafactor": "parameter", "lamb": "group", "muon": "group"}
"""Of what an optimizer counts the steps, in an fp32 tensor for each. The others do not count."""
HOST_COUNTERS = ("adafactor", "lamb")
"""Optimizers whose counters lie in the host's memory."""
AT_ONCE = 500_000_000
"""Gradients that DeepSpeed exchanges in one piece after the backward passes."""
WORKSPACE = {"cpu": 0, "cuda": 150_000_000}
"""Bytes that libraries keep in torch's allocator: what an eager ViT-L and a ResNet-50 needed on an H100 beyond all else."""


@dataclass(frozen=True)
class Layout:
    """A mesh on paper: what `bigvision.runtime` makes of as many ranks."""

    strategy: str
    ranks: int
    stages: int = 1
    """Ranks in a pipeline."""
    replicas: int = 1
    shards: int = 1
    stages_per_rank: int = 1

    @classmethod
    def of(cls, config: Config, ranks: int) -> Layout:
        """Raises `UserError` where *ranks* cannot be divided as *config* asks."""
        parallel = config.parallel
        pipelined = parallel.strategy == "pipeline"
        stages = (parallel.stages or ranks) if pipelined else 1
        replicas = parallel.replicas if parallel.strategy in ("fsdp", "pipeline") else 1
        if ranks % stages:
            raise UserError(f"parallel.stages: {stages} does not divide the {ranks} ranks: start a multiple of {stages} ranks")
        if ranks // stages % replicas:
            of_stage = " of a stage" if pipelined and stages > 1 else ""
            raise UserError(f"parallel.replicas: {replicas} does not divide the {ranks // stages} ranks{of_stage}")
        shards = ranks // stages // replicas
        return cls(parallel.strategy, ranks, stages, replicas, shards, parallel.per_rank if pipelined else 1)

    @property
    def data_ranks(self) -> int:
        """Into how many parts a batch is cut."""
        return self.ranks // self.stages

    def place(self, rank: int) -> tuple[int, int, int]:
        """(stage, replica, shard) of a rank."""
        stage, rest = divmod(rank, self.data_ranks)
        return stage, *divmod(rest, self.shards)

    def micro_batch(self, config: Config) -> int:
        """Samples of one forward and backward pass on a rank."""
        return micro_batch(config, self.data_ranks, self.stages)


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

    @property
    def state(self) -> int:
        """What is held between steps."""
        of_model = self.parameters + self.buffers + self.optimizer + self.ema
        return of_model + self.buckets + self.received + self.scalars + self.teacher


@dataclass(frozen=True)
class _State:
    """What a rank holds between steps, in bytes."""

    parameters: int = 0
    optimizer: int = 0
    gradients: int = 0
    """When the backward pass is over."""
    buckets: int = 0
    host: int = 0


def _fragments_state(profile: Profile, config: Config, layout: Layout, tensors: list[StateTensor], shard: int) -> _State:
    """Of ddp, fsdp and pipelines: a rank's shards of *tensors*, or all of them."""
    parameters = optimizer = gradients = 0
    for tensor in tensors:
        if not tensor.buffer:
            stored, local = _share(layout, tensor, shard)
            parameters += stored * tensor.dtype.itemsize
            if tensor.trained:
                optimizer += optimizer_bytes(config.optim, tensor.shape, local)
                gradients += stored * MASTER
    counters = _counters(profile, config.optim, layout, tensors)
    host = counters if config.optim.name in HOST_COUNTERS else 0
    # DistributedDataParallel keeps its buckets, and gradients are views of them.
    buckets = gradients if layout.strategy == "ddp" and layout.ranks > 1 else 0
    return _State(parameters, optimizer + counters - host, gradients, buckets, host)


def _counters(profile: Profile, optim: OptimConfig, layout: Layout, tensors: list[StateTensor]) -> int:
    """Bytes of an optimizer's counters of steps, which steps *tensors*."""
    trained = {tensor.name: tensor for tensor in tensors if tensor.trained}
    kind = COUNTERS.get(optim.name)
    if kind != "group":
        return MASTER * len(trained) if kind else 0
    # A group holds sharded or whole parameters; a stage without a trained parameter has an empty one.
    sharded = _shards_parameters(layout)
    groups = {
        (number, sharded and not trained[name].whole)
        for number, names in enumerate(profile.groups)
        for name in names
        if name in trained
    }
    return MASTER * max(1, len(groups))


def _scalars(config: Config, layout: Layout, profile: Profile, computes_loss: bool) -> int:
    """Bytes of small tensors: what images are normalised by, what a skip is decided by, and the last step's numbers."""
    share, optim = config.train.global_batch // layout.data_ranks, config.optim
    normalisation = 2 * MASTER * profile.image[0]
    numbers = 8 * (4 + len(REQUESTS)) + 8  # a `Record`, and the largest statistic of a model that has none
    # Of each micro-batch its loss, and of each sample whether its outputs are finite.
    checks = MASTER * -(-share // layout.micro_batch(config)) + share if computes_loss else 0
    if layout.strategy == "zero3":  # finite, the norm as fp64, a flag of overflows
        return normalisation + numbers + checks + 1 + 8 + 1
    if layout.strategy.startswith("zero"):  # finite, the norm as fp32
        return normalisation + numbers + checks + 1 + 4
    skipping = {"adamw": 4, "sgd": 4, "muon": 1}.get(optim.name, 0)  # whether to skip: fp32 for torch's fused steps, or bool
    if skipping == 4 and (optim.clip is not None or config.parallel.precision == "fp16"):
        skipping += 4  # what gradients are divided by
    return normalisation + numbers + checks + skipping + 4 + 8  # the loss scale and its good steps


def _zero_state(profile: Profile, config: Config, layout: Layout) -> _State:
    """Of DeepSpeed's stages; all ranks hold as much. Weights in the compute type, fp32 masters and moments of a share."""
    ranks, offload = layout.ranks, config.parallel.offload
    parameters = [tensor for tensor in profile.tensors if not tensor.buffer]
    knobs = zero_settings(profile, config, ranks)
    moment = sum(dtype.itemsize for _, dtype in state_layout(config.optim, (1, 1)).values())
    counter = 4 if config.optim.name == "adamw" and offload == "none" else 0
    # Of frozen weights that are saved in another type than they compute in each rank keeps a share in host memory.
    host = sum(-(-t.numel // ranks) * t.dtype.itemsize for t in parameters if not t.trained and t.dtype != t.computes)
    if layout.strategy == "zero3":
        share = sum(-(-t.numel // ranks) for t in parameters if t.trained)
        held = sum(-(-t.numel // ranks) * t.computes.itemsize for t in parameters)
        # What is kept whole is gathered with its padding.
        kept = [t for t in parameters if t.numel <= knobs["stage3_param_persistence_threshold"] and ranks > 1]
        whole = sum(-(-t.numel // ranks) * ranks * t.computes.itemsize for t in kept)
        masters, moments, gradients, flats = MASTER * share, moment * share, MASTER * share, len(profile.groups)
        bucket = MASTER * knobs["reduce_bucket_size"]
    else:
        # Each group is one flat tensor, a multiple of two numbers for each rank.
        padded = padded_groups(profile, ranks)
        held = sum(padded) * profile.compute.itemsize
        held += sum(t.numel * t.computes.itemsize for t in parameters if not t.trained)
        whole, masters, moments, flats = 0, MASTER * sum(padded) // ranks, moment * sum(padded) // ranks, len(padded)
        gradients = MASTER * sum(t.numel for t in parameters if t.trained) // (ranks if layout.strategy == "zero2" else 1)
        bucket = 0
    if offload == "all":
        host, held = host + held, 0
    if offload != "none":
        return _State(held + whole, 0, 0, bucket, host + masters + moments + gradients)
    persistent = gradients if layout.strategy == "zero3" else 0
    if layout.strategy == "zero1" and profile.compute.itemsize < MASTER:
        # It accumulates gradients in fp32, laid out as the weights, beside those that the backward pass makes.
        persistent = MASTER * sum(padded)
    return _State(held + whole + masters, moments + counter * flats, gradients, bucket + persistent, host)


def zero_settings(profile: Profile, config: Config, ranks: int) -> dict[str, int]:
    """DeepSpeed's sizes of buckets and thresholds, as the engine sets them."""
    largest = max((part.numel for part in profile.parts if part.path), default=0)
    return deepspeed_settings(config, ranks, profile.device, profile.parameters, largest)["zero_optimization"]


def _share(layout: Layout, tensor: StateTensor, shard: int) -> tuple[int, int]:
    """(elements that a rank allocates, elements that it has) of a parameter."""
    return share_of(tensor, layout.shards, shard) if _shards_parameters(layout) else (tensor.numel, tensor.numel)


def _shards_parameters(layout: Layout) -> bool:
    """Whether ``fully_shard`` has cut the parameters."""
    return layout.shards > 1 if layout.strategy == "pipeline" else layout.strategy == "fsdp" and layout.ranks > 1


def rank_memory(profile: Profile, config: Config, layout: Layout, rank: int) -> Memory:
    """What *rank* of *layout* needs for the step of *profile*, which is of the same *config*."""
    stage, _, shard = layout.place(rank)
    tensors = list(profile.tensors)
    if layout.strategy == "pipeline":
        plan = cut_stages(profile, config, layout)
        mine = set(plan.memory.placement.numbers(stage))
        tensors = [tensor for tensor in tensors if mine & set(plan.owners[tensor.name])]
    if layout.strategy.startswith("zero"):
        state = _zero_state(profile, config, layout)
    else:
        state = _fragments_state(profile, config, layout, tensors, shard)
    buffers = sum(t.nbytes * (2 if t.running else 1) for t in tensors if t.buffer)
    ema = 0
    if config.ema.decay is not None:
        # A counter of updates; averages lie where what they follow lies.
        masters = _averaged(profile, layout, shard, tensors)
        ema = 8 + sum(tensor.nbytes for tensor in tensors if tensor.buffer and tensor.averaged)
        if layout.strategy.startswith("zero") and config.parallel.offload != "none":
            state = replace(state, host=state.host + masters)
        else:
            ema += masters
    images = round(layout.micro_batch(config) * (math.prod(profile.image) * (1 + MASTER) + profile.targets))
    last = layout.strategy != "pipeline" or layout.stages * layout.stages_per_rank - 1 in mine
    scalars = _scalars(config, layout, profile, computes_loss=last)
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
    )  # fmt: skip


def _stages_memory(
    rank: int, plan: _Stages, stages: set[int], state: _State, buffers: int, ema: int, received: int, scalars: int, images: int,
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
    if not profile.update or config.parallel.offload != "none":
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
class _Stages:
    """The stages of a pipeline as the engine cuts them."""

    costs: list[Cost]
    owners: dict[str, list[int]]
    """The stages with each parameter and buffer."""
    memory: StageMemory
    returned: list[float]
    """Bytes of the gradients that come back to each stage for an image: none of what needs no gradient."""

    def received(self, stage: int) -> float:
        """Bytes that a stage receives for one image."""
        return self.costs[stage].received + self.returned[stage]


def cut_stages(profile: Profile, config: Config, layout: Layout) -> _Stages:
    """Where the engine cuts the model of *profile*. Without a limit of memory that does not depend on the micro-batch."""
    assert profile.model is not None
    placement = Placement(layout.stages, layout.stages_per_rank, config.parallel.schedule in SPLIT_BACKWARD)
    memory = StageMemory.of(config, placement, layout.micro_batch(config), layout.data_ranks, layout.shards)
    found, key = _cuts.setdefault(profile.model, {}), (placement, memory.compute, memory.recompute)
    if key not in found:
        model, device = profile.model, torch.device(profile.device)
        if "blocks" not in found:
            found["blocks"] = find_blocks(model, profile.image[1:])
        best = cut(model, found["blocks"], profile.image, device, memory, found.setdefault("flows", {}))
        returned = [best.prices.returning(end) for _, end in best.bounds]
        found[key] = _Stages(best.costs, best.owners(model), memory, returned)
    return replace(found[key], memory=memory)


_cuts: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()
"""Of each model its blocks and the plans so far: ranks of one mesh share theirs."""


@dataclass(frozen=True)
class _Most:
    """What is allocated at the peak of a step, beside what is held between steps and the images."""

    activations: float
    working: float
    total: float


class _Step:
    """What the passes of a step and its update allocate on a rank."""

    def __init__(self, profile: Profile, config: Config, layout: Layout, state: _State) -> None:
        self.profile, self.config, self.layout, self.state = profile, config, layout, state
        self.images = layout.micro_batch(config)
        share = config.train.global_batch // layout.data_ranks
        self.repeats = -(-share // self.images) > 1
        """Whether gradients of earlier micro-batches are there already."""
        self.trained = sum(part.trained for part in profile.parts)
        self.after_passes = layout.strategy == "zero1" and profile.compute == torch.bfloat16
        """Whether gradients are exchanged after all passes, in fp32: for bf16 DeepSpeed has an optimizer of its own."""

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
            return lambda _, span: ((moment, max(0.0, whole - moment.gradients) * self.repeats) for moment in span.peaks)
        return lambda _, span: ((moment, whole if self.repeats else moment.gradients) for moment in span.peaks)

    def update(self) -> float:
        """Gradients, and what the optimizer's step allocates."""
        strategy = self.layout.strategy
        stepped = _stepped(self.profile, self.config, self.layout, self.state.gradients)
        if self.after_passes:
            return MASTER * min(self.trained, AT_ONCE) + stepped
        if strategy in ("zero1", "zero2"):
            # The share of the gradients, from which the flat gradient is made; it is not smaller than all of zero1's.
            part = MASTER * sum(padded_groups(self.profile, self.layout.ranks)) / self.layout.ranks
            return (self.state.gradients if strategy == "zero1" else part) + part + stepped
        return (0.0 if self.state.buckets else float(self.state.gradients)) + stepped

    def averaging(self, ema: int) -> float:
        """What an update of the EMA allocates: the differences of one bucket."""
        return min(ema, MASTER * BUCKET)


class _Teacher:
    """What a rank holds of a frozen teacher, and needs for its pass, which comes before the student's."""

    def __init__(self, profile: Profile, config: Config, layout: Layout, shard: int) -> None:
        layout = replace(layout, strategy="fsdp" if layout.strategy in ("fsdp", "zero3") else "ddp")
        step = _Step(profile, config, layout, _State())
        shares = ((tensor, tensor.numel if tensor.buffer else _share(layout, tensor, shard)[0]) for tensor in profile.tensors)
        self.held = sum(stored * tensor.dtype.itemsize for tensor, stored in shares)
        # It gets images of its own size and normalisation.
        self.most = step.peak(shard).total + MASTER * math.prod(profile.image) * step.images
        self.told = step.live(profile.spans[-1].end)
        """What it returns, which the student's loss needs."""


class _Gathered:
    """fsdp: gathered weights, those that are on their way, and gradients on their way back."""

    def __init__(self, step: _Step, shard: int) -> None:
        profile, layout, parallel = step.profile, step.layout, step.config.parallel
        self.step, self.spans = step, profile.spans
        self.keeps, self.late = parallel.reshard == "never", parallel.scatter == "last" and step.repeats
        self.weights: list[float] = []
        """Of each part, gathered."""
        self.gradients: list[float] = []
        """Of each part, in fp32, padded."""
        self.shards: list[float] = []
        """Of each part's gradients, this rank's."""
        for part in profile.parts:
            cut = [tensor for tensor in part.tensors if not tensor.buffer and not tensor.whole]
            chunks = [(share_of(tensor, layout.shards, shard)[0], tensor) for tensor in cut]
            self.weights.append(sum(chunk * layout.shards * tensor.computes.itemsize for chunk, tensor in chunks))
            self.shards.append(sum(MASTER * chunk for chunk, tensor in chunks if tensor.trained))
            self.gradients.append(self.shards[-1] * layout.shards)
        self.blocks = [number for number, part in enumerate(profile.parts) if part.path]
        self.root = sum(weight for weight, part in zip(self.weights, profile.parts) if not part.path)
        self.whole = sum(t.numel * MASTER for t in profile.tensors if t.whole and t.trained)

    def moments(self, place: int, span: Span) -> Iterator[tuple[Moment, float]]:
        begin = self.spans[place].begin.gradients
        part, block = span.part, bool(self.step.profile.parts[span.part].path)
        before = [number for number in self.blocks if number < part]
        after = [number for number in self.blocks if number > part]
        single = self.step.layout.shards == 1
        here = self.weights[part] if block else 0.0
        held = self.root
        if self.keeps:
            held += sum(self.weights[number] for number in (before if not span.backward else [*before]))
        if not span.backward:
            coming = self.weights[after[0]] if after else 0.0
            copied = here if block else self.weights[before[-1]] if before else 0.0
            held += here + (0.0 if single else coming + copied)
            for moment in span.peaks:
                yield moment, held + self._scattered([])
            return
        # What lies outside of blocks keeps its gradients, and the weights, to the end of the pass.
        outside = sum(
            other.end.gradients - other.begin.gradients
            for other in self.spans[:place]
            if other.backward and not self.step.profile.parts[other.part].path
        )
        # A replica on a single rank gathers nothing: what is prefetched gets memory when it is used.
        coming = self.weights[before[-1]] if before and not (self.keeps or single) else 0.0
        leaving = self.gradients[after[0]] if after else 0.0
        done = self._scattered(after)
        for moment in span.peaks:
            yield moment, held + here + coming + leaving + outside + done + moment.gradients - begin
        if block:
            mine = span.end.gradients - begin
            # gloo reduces a copy, when the block's own gradients are gone.
            mine = max(mine, self.gradients[part]) if self.step.profile.device == "cpu" and not single else mine
            yield span.end, held + coming + outside + done + mine + self.gradients[part] + self.shards[part]
        elif place == len(self.spans) - 1:
            total = outside + span.end.gradients - begin
            root = sum(g for g, part in zip(self.gradients, self.step.profile.parts) if not part.path)
            yield span.end, total + done + root + leaving

    def _scattered(self, done: list[int]) -> float:
        """This rank's gradients when those of the blocks *done* have been exchanged."""
        if self.late:
            return sum(self.gradients)
        return (sum(self.shards) if self.step.repeats else sum(self.shards[number] for number in done)) + self.whole


class _Partitioned:
    """DeepSpeed: gradients, the bucket in which they are exchanged, and the weights that stage 3 gathers."""

    def __init__(self, step: _Step) -> None:
        self.step, layout = step, step.layout
        knobs = zero_settings(step.profile, step.config, layout.ranks)
        self.stage, self.size = layout.strategy, knobs["reduce_bucket_size"]
        self.half = step.profile.compute.itemsize < MASTER
        # Stage 1 copies gradients into its buckets in the type that they come in, if that is half of fp32.
        width = step.profile.compute.itemsize if self.stage == "zero1" else MASTER
        self.bucket = 0 if step.after_passes else width * self.size * (2 if knobs["overlap_comm"] else 1)
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
            repeated = self.step.repeats and not (self.stage == "zero1" and self.half)
            yield moment, exchanged + (self.whole if repeated else gradients)

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
            yield span.end, weights * (not last) + copies * MASTER * min(self.size, self.step.trained)


def padded_groups(profile: Profile, ranks: int) -> list[int]:
    """Elements of each parameter group as DeepSpeed lays it out: a multiple of two for each rank."""
    sizes = {tensor.name: tensor.numel for tensor in profile.tensors}
    return [-(-sum(sizes[name] for name in group) // (2 * ranks)) * 2 * ranks for group in profile.groups]


def _averaged(profile: Profile, layout: Layout, shard: int, tensors: list[StateTensor]) -> int:
    """Bytes of the averages of the parameters among *tensors* on a rank; under ZeRO of its share of the masters."""
    parameters = [tensor for tensor in tensors if tensor.averaged and not tensor.buffer]
    if layout.strategy == "zero3":
        sizes = [(tensor.numel, -(-tensor.numel // layout.ranks)) for tensor in parameters]
    elif layout.strategy.startswith("zero"):
        numel = {tensor.name: tensor.numel for tensor in parameters}
        wholes = [sum(numel[name] for name in group) for group in profile.groups]
        sizes = list(zip(wholes, (padded // layout.ranks for padded in padded_groups(profile, layout.ranks))))
    else:
        return sum(_share(layout, tensor, shard)[1] * tensor.dtype.itemsize for tensor in parameters)
    return MASTER * sum(max(0, min(size, whole - size * shard)) for whole, size in sizes)


def worst(profile: Profile, config: Config, layout: Layout) -> Memory:
    """Of the rank that needs the most."""
    return max((rank_memory(profile, config, layout, rank) for rank in representatives(layout)), key=lambda m: m.peak)


def representatives(layout: Layout) -> Iterator[int]:
    """A rank of each group that needs the same: of each stage the first one, and the last, which may have smaller shards."""
    for stage in range(layout.stages):
        first = stage * layout.data_ranks
        yield from dict.fromkeys((first, first + layout.shards - 1))


def share_of(tensor: StateTensor, shards: int, shard: int) -> tuple[int, int]:
    """(elements that a rank allocates, elements of them that it has) of a tensor that ``fully_shard`` cuts along dimension 0.

    All shards are as large as the first one; the last ones are padded.
    """
    if tensor.whole or not tensor.shape:
        return tensor.numel, tensor.numel
    rows, width = tensor.shape[0], math.prod(tensor.shape[1:])
    chunk = -(-rows // shards)
    return chunk * width, max(0, min(chunk, rows - chunk * shard)) * width


@functools.cache
def _states(optim: OptimConfig, shape: tuple[int, ...]) -> float:
    """Bytes of state for each element of a parameter."""
    found = state_layout(optim, shape)
    return sum(math.prod(kept) * dtype.itemsize for kept, dtype in found.values()) / max(1, math.prod(shape))


def optimizer_bytes(optim: OptimConfig, shape: tuple[int, ...], local: int) -> int:
    """Bytes of the optimizer's state of *local* elements of a parameter of *shape*, without a counter of steps."""
    # Of these two what is kept depends on the shape.
    return round(_states(optim, shape if optim.name in ("adafactor", "muon") else (1, 1)) * local)
