"""What each rank of a mesh on paper holds between two steps, in bytes.

That is every tensor of its engine, counted once for each storage: parameters, buffers, masters, moments, averages, buckets,
what torch's pipelines receive into, and the scalars beside them, with the numbers of the last step, which wait there to be
read. The batch and the images made of it are counted apart, since they come from the data.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from bigvision.config import Config, OptimConfig, deepspeed_settings, micro_batch
from bigvision.engine.step import REQUESTS
from bigvision.errors import UserError
from bigvision.models.formats import COMPUTE_DTYPES
from bigvision.optim import state_layout
from bigvision.planning.profile import Profile, StateTensor

MASTER = 4
"""Bytes of an fp32 value."""
COUNTERS = {"adamw": "parameter", "adafactor": "parameter", "lamb": "group", "muon": "group"}
"""Of what an optimizer counts the steps, in an fp32 tensor for each. The others do not count."""
HOST_COUNTERS = ("adafactor", "lamb")
"""Optimizers whose counters lie in the host's memory."""


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
    capacity: float | None = None
    """Bytes of a device that a run may take, by which the engine cuts stages; None is no limit, as on CPUs."""

    @classmethod
    def of(cls, config: Config, ranks: int, capacity: float | None = None) -> Layout:
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
        return cls(parallel.strategy, ranks, stages, replicas, shards, parallel.per_rank if pipelined else 1, capacity)

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
class State:
    """What a rank holds between steps, in bytes."""

    parameters: int = 0
    optimizer: int = 0
    gradients: int = 0
    """When the backward pass is over."""
    buckets: int = 0
    host: int = 0


def state_of(profile: Profile, config: Config, layout: Layout, tensors: list[StateTensor], shard: int) -> State:
    """Of a rank with a *shard* of *tensors*."""
    if layout.strategy.startswith("zero"):
        return _zero_state(profile, config, layout, shard)
    return _fragments_state(profile, config, layout, tensors, shard)


def _fragments_state(profile: Profile, config: Config, layout: Layout, tensors: list[StateTensor], shard: int) -> State:
    """Of ddp, fsdp and pipelines: a rank's shards of *tensors*, or all of them."""
    parameters = optimizer = gradients = 0
    for tensor in tensors:
        if not tensor.buffer:
            stored, local = local_share(layout, tensor, shard)
            parameters += stored * tensor.dtype.itemsize
            if tensor.trained:
                optimizer += optimizer_bytes(config.optim, tensor.shape, local)
                gradients += stored * MASTER
    counters = _counters(profile, config.optim, layout, tensors)
    host = counters if config.optim.name in HOST_COUNTERS else 0
    # DistributedDataParallel keeps its buckets, and gradients are views of them; its map lies in both memories.
    buckets = gradients if layout.strategy == "ddp" and layout.ranks > 1 else 0
    used = used_map(profile, layout.strategy, layout.ranks)
    return State(parameters, optimizer + counters - host, gradients, buckets + used, host + used)


def used_map(profile: Profile, strategy: str, ranks: int) -> int:
    """Bytes of the map of trained parameters that got a gradient, an int32 for each, where some get none under ddp."""
    return (
        MASTER * sum(tensor.trained for tensor in profile.tensors) if strategy == "ddp" and ranks > 1 and profile.unused else 0
    )


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


def scalars_of(config: Config, layout: Layout, profile: Profile, computes_loss: bool) -> int:
    """Bytes of small tensors: what images and targets are normalised or weighed by, what a skip is decided by, and the last
    step's numbers."""
    share, optim = config.train.global_batch // layout.data_ranks, config.optim
    # Of images and of targets, and what the losses of a step are divided by.
    normalisation = 2 * MASTER * profile.image[0] + profile.task + 8 * profile.weighed
    if layout.strategy == "pipeline":  # what losses are multiplied with, where that is a tensor
        normalisation += 8 if profile.weighed else 4 * (config.parallel.precision == "fp16")
    numbers = 8 * (4 + len(REQUESTS)) + 8  # a `Record`, and the largest statistic of a model that has none
    # Of each micro-batch its loss, and of each sample whether its outputs are finite.
    checks = MASTER * -(-share // layout.micro_batch(config)) + share if computes_loss else 0
    if layout.strategy == "zero3":  # finite, the norm as fp64, or as fp32 where the CPU steps, a flag of overflows
        return normalisation + numbers + checks + 1 + (4 if config.parallel.offloads_state else 8) + 1
    if layout.strategy.startswith("zero"):  # finite, the norm as fp32
        return normalisation + numbers + checks + 1 + 4
    skipping = {"adamw": 4, "sgd": 4, "muon": 1}.get(optim.name, 0)  # whether to skip: fp32 for torch's fused steps, or bool
    if skipping == 4 and (optim.clip is not None or config.parallel.precision == "fp16"):
        skipping += 4  # what gradients are divided by
    return normalisation + numbers + checks + skipping + 4 + 8  # the loss scale and its good steps


def _zero_state(profile: Profile, config: Config, layout: Layout, shard: int) -> State:
    """Of DeepSpeed's stages: weights in the compute type, fp32 masters and moments of a share."""
    ranks, compute = layout.ranks, profile.compute
    parameters = [tensor for tensor in profile.tensors if not tensor.buffer]
    trained = [tensor for tensor in parameters if tensor.trained]
    knobs = zero_settings(profile, config, ranks)
    counter = 4 if config.optim.name == "adamw" else 0
    # Of frozen weights that are saved in another type than they compute in each rank keeps a share in host memory.
    host = sum(-(-t.numel // ranks) * t.dtype.itemsize for t in parameters if not t.trained and t.dtype != t.computes)
    whole = bucket = 0
    if layout.strategy == "zero3":
        share = sum(-(-t.numel // ranks) for t in trained)
        held = sum(-(-t.numel // ranks) * t.computes.itemsize for t in parameters)
        # What is kept whole is gathered with its padding.
        kept = [t for t in parameters if t.numel <= knobs["stage3_param_persistence_threshold"] and ranks > 1]
        whole = sum(-(-t.numel // ranks) * ranks * t.computes.itemsize for t in kept)
        gradients = MASTER * share
        bucket = COMPUTE_DTYPES[config.parallel.reduce].itemsize * knobs["reduce_bucket_size"]
    else:
        # Each group is one flat tensor, a multiple of two numbers for each rank.
        padded = padded_groups(profile, ranks)
        share = sum(padded) // ranks
        held = sum(padded) * compute.itemsize + sum(t.numel * t.computes.itemsize for t in parameters if not t.trained)
        gradients = MASTER * sum(t.numel for t in trained) // (ranks if layout.strategy == "zero2" else 1)
    masters = MASTER * share
    moments = share * sum(dtype.itemsize for _, dtype in state_layout(config.optim, (1, 1)).values())
    if not config.parallel.offloads_state:
        # Stage 3 keeps its share of the gradients; stage 1 in bf16 accumulates all of them in fp32, laid out as the weights,
        # beside those that the backward pass makes.
        persistent = gradients if layout.strategy == "zero3" else 0
        if after_passes(config, compute):
            persistent = MASTER * sum(padded)
        return State(held + whole + masters, moments + counter * len(profile.groups), gradients, bucket + persistent, host)
    # The gradients with which the CPU steps, beside its share.
    host += masters + moments + MASTER * share
    if layout.strategy == "zero3":
        host += gradients
    else:
        # The new weights in the compute type, and on either side a buffer for a gradient that is copied.
        bucket = max(t.numel for t in trained) * compute.itemsize
        host += share * compute.itemsize + bucket
        several = layout.micro_batch(config) < config.train.global_batch // ranks
        if layout.strategy == "zero2" and several and compute.itemsize == MASTER:
            # Sums of micro-batches, of each parameter of which it has a part; in half precision they stay on the device.
            host += sum(MASTER * numel for numel in _in_share(profile, ranks, shard))
    if config.parallel.offloads_parameters:
        host, held = host + held, 0
    return State(held + whole, 0, 0, bucket, host)


def _in_share(profile: Profile, ranks: int, shard: int) -> Iterator[int]:
    """Elements of each parameter of which DeepSpeed's first two stages give a part to the rank *shard*."""
    sizes = {tensor.name: tensor.numel for tensor in profile.tensors}
    for names, padded in zip(profile.groups, padded_groups(profile, ranks)):
        begin, end = padded // ranks * shard, padded // ranks * (shard + 1)
        starts = itertools.accumulate((sizes[name] for name in names), initial=0)
        yield from (sizes[name] for name, start in zip(names, starts) if start < end and start + sizes[name] > begin)


def zero_settings(profile: Profile, config: Config, ranks: int) -> dict[str, int]:
    """DeepSpeed's sizes of buckets and thresholds, as the engine sets them."""
    largest = max((part.numel for part in profile.parts if part.path), default=0)
    return deepspeed_settings(config, ranks, profile.device, profile.parameters, largest)["zero_optimization"]


def after_passes(config: Config, compute: torch.dtype) -> bool:
    """Whether gradients are exchanged after all passes: for bf16 DeepSpeed's first stage has an optimizer of its own."""
    parallel = config.parallel
    return parallel.strategy == "zero1" and not parallel.offloads_state and compute == torch.bfloat16


def local_share(layout: Layout, tensor: StateTensor, shard: int) -> tuple[int, int]:
    """(elements that a rank allocates, elements that it has) of a parameter."""
    return share_of(tensor, layout.shards, shard) if _shards_parameters(layout) else (tensor.numel, tensor.numel)


def _shards_parameters(layout: Layout) -> bool:
    """Whether ``fully_shard`` has cut the parameters."""
    return layout.shards > 1 if layout.strategy == "pipeline" else layout.strategy == "fsdp" and layout.ranks > 1


def padded_groups(profile: Profile, ranks: int) -> list[int]:
    """Elements of each parameter group as DeepSpeed lays it out: a multiple of two for each rank."""
    sizes = {tensor.name: tensor.numel for tensor in profile.tensors}
    return [-(-sum(sizes[name] for name in group) // (2 * ranks)) * 2 * ranks for group in profile.groups]


def averages_of(profile: Profile, layout: Layout, shard: int, tensors: list[StateTensor]) -> int:
    """Bytes of the averages of the parameters among *tensors* on a rank; under ZeRO of its share of the masters."""
    parameters = [tensor for tensor in tensors if tensor.averaged and not tensor.buffer]
    if layout.strategy == "zero3":
        sizes = [(tensor.numel, -(-tensor.numel // layout.ranks)) for tensor in parameters]
    elif layout.strategy.startswith("zero"):
        numel = {tensor.name: tensor.numel for tensor in parameters}
        wholes = [sum(numel[name] for name in group) for group in profile.groups]
        sizes = list(zip(wholes, (padded // layout.ranks for padded in padded_groups(profile, layout.ranks))))
    else:
        return sum(local_share(layout, tensor, shard)[1] * tensor.dtype.itemsize for tensor in parameters)
    return MASTER * sum(max(0, min(size, whole - size * shard)) for whole, size in sizes)


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
