"""How many bytes each rank needs: its share of the state, exactly, and its peak in a step.

Which share a rank has follows from its place in the mesh alone, so the ranks of a mesh fall into few groups that need the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from bigvision.config import Config, OptimConfig, deepspeed_settings, micro_batch
from bigvision.errors import UserError
from bigvision.optim import state_layout
from bigvision.planning.profile import Profile, StateTensor

MASTER = 4
"""Bytes of an fp32 value."""


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

    @property
    def state(self) -> int:
        """What is held between steps."""
        return self.parameters + self.buffers + self.optimizer + self.ema + self.buckets


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
                optimizer += optimizer_bytes(config.optim, tensor, local)
                gradients += stored * MASTER
    # DistributedDataParallel keeps its buckets, and gradients are views of them.
    buckets = gradients if layout.strategy == "ddp" and layout.ranks > 1 else 0
    return _State(parameters, optimizer, gradients, buckets)


def _zero_state(profile: Profile, config: Config, layout: Layout) -> _State:
    """Of DeepSpeed's stages; all ranks hold as much. Weights in the compute type, fp32 masters and moments of a share."""
    ranks, offload = layout.ranks, config.parallel.offload
    parameters = [tensor for tensor in profile.tensors if not tensor.buffer]
    knobs = zero_settings(profile, config, layout)
    moment = sum(dtype.itemsize for _, dtype in state_layout(config.optim, (1, 1)).values())
    counter = 4 if config.optim.name == "adamw" and offload == "none" else 0
    # Of frozen weights that are saved in another type than they compute in each rank keeps a share in host memory.
    host = sum(
        -(-t.numel // ranks) * t.dtype.itemsize for t in parameters if not t.trained and t.dtype != t.computes
    )
    if layout.strategy == "zero3":
        share = sum(-(-t.numel // ranks) for t in parameters if t.trained)
        held = sum(-(-t.numel // ranks) * t.computes.itemsize for t in parameters)
        whole = sum(t.numel * t.computes.itemsize for t in parameters if t.numel <= knobs["stage3_param_persistence_threshold"])
        masters, moments, gradients, flats = MASTER * share, moment * share, MASTER * share, 1
        bucket = MASTER * knobs["reduce_bucket_size"]
    else:
        # Each group is one flat tensor, a multiple of two numbers for each rank.
        sizes = {t.name: t.numel for t in parameters}
        groups = [sum(sizes[name] for name in group) for group in profile.groups]
        padded = [-(-numel // (2 * ranks)) * 2 * ranks for numel in groups]
        held = sum(padded) * profile.compute.itemsize
        held += sum(t.numel * t.computes.itemsize for t in parameters if not t.trained)
        whole, masters, moments, flats = 0, MASTER * sum(padded) // ranks, moment * sum(padded) // ranks, len(groups)
        gradients = MASTER * sum(groups) // (ranks if layout.strategy == "zero2" else 1)
        bucket = 0
    if offload == "all":
        host, held = host + held, 0
    if offload != "none":
        return _State(held + whole, 0, 0, bucket, host + masters + moments + gradients)
    persistent = gradients if layout.strategy == "zero3" else 0
    return _State(held + whole + masters, moments + counter * flats, gradients, bucket + persistent, host)


def zero_settings(profile: Profile, config: Config, layout: Layout) -> dict[str, int]:
    """DeepSpeed's sizes of buckets and thresholds, as the engine sets them."""
    largest = max((part.numel for part in profile.parts if part.path), default=0)
    return deepspeed_settings(config, layout.ranks, profile.device, profile.parameters, largest)["zero_optimization"]


def _share(layout: Layout, tensor: StateTensor, shard: int) -> tuple[int, int]:
    """(elements that a rank allocates, elements that it has) of a parameter."""
    sharded = layout.strategy == "pipeline" or (layout.strategy == "fsdp" and layout.ranks > 1)
    return share_of(tensor, layout.shards, shard) if sharded else (tensor.numel, tensor.numel)


def rank_memory(profile: Profile, config: Config, layout: Layout, rank: int) -> Memory:
    """What *rank* of *layout* needs for the step of *profile*, which is of the same *config*."""
    _, _, shard = layout.place(rank)
    tensors = list(profile.tensors)
    if layout.strategy.startswith("zero"):
        state = _zero_state(profile, config, layout)
    else:
        state = _fragments_state(profile, config, layout, tensors, shard)
    buffers = sum(t.nbytes * (2 if t.running else 1) for t in tensors if t.buffer)
    ema = 0
    if config.ema.decay is not None:
        ema = 8 + sum(_averaged(layout, t, shard) * t.dtype.itemsize for t in tensors if t.averaged)
    count = layout.micro_batch(config)
    images = round(count * (math.prod(profile.image) * (1 + MASTER) + profile.targets))
    most = max(
        (moment for span in profile.spans for moment in span.peaks),
        key=lambda m: m.fixed + m.per_image * count + m.gradients,
    )
    activations = round(most.per_image * count)
    held = state.parameters + buffers + state.optimizer + ema + state.buckets
    return Memory(
        rank, state.parameters, buffers, state.optimizer, ema, state.gradients, state.buckets, images, state.host,
        round(most.fixed), activations, 0, held + images + round(most.fixed + most.gradients) + activations,
    )  # fmt: skip


def _averaged(layout: Layout, tensor: StateTensor, shard: int) -> int:
    """Elements of a tensor that a rank averages; under ZeRO those of its share of the masters."""
    if layout.strategy.startswith("zero") and not tensor.buffer:
        return -(-tensor.numel // layout.ranks)
    return tensor.numel if tensor.buffer else _share(layout, tensor, shard)[1]


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
def _states(optim: OptimConfig, shape: tuple[int, ...]) -> tuple[float, int]:
    """(bytes of state for each element of a parameter, bytes of its step counter)."""
    found = state_layout(optim, shape)
    size = sum(math.prod(kept) * dtype.itemsize for kept, dtype in found.values())
    return size / max(1, math.prod(shape)), 4 if optim.name == "adamw" else 0


def optimizer_bytes(optim: OptimConfig, tensor: StateTensor, local: int) -> int:
    """Bytes of the optimizer's state of *local* elements of a parameter."""
    # Of these two what is kept depends on the shape.
    shape = tensor.shape if optim.name in ("adafactor", "muon") else (1, 1)
    each, counter = _states(optim, shape)
    return round(each * local) + counter
