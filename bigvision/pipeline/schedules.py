"""Which rank has which stage, the schedules of ``torch.distributed.pipelining`` by name, and the memory they need."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining._backward import stage_backward_weight

from bigvision.config import ONE_STAGE, Config
from bigvision.models.formats import COMPUTE_DTYPES
from bigvision.models.tracing import Cost
from bigvision.optim import state_bytes
from bigvision.ranges import BACKWARD, mark

SCHEDULES = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
USABLE = 0.9  # of a device's memory; the rest is for the context, libraries' workspaces and fragmentation
MASTER = 4  # bytes of an fp32 value: master weights, gradients


@dataclass(frozen=True)
class Placement:
    """The stages of a pipeline on its ranks: one after the other and again from the first, or there and back (a V)."""

    ranks: int
    per_rank: int
    back: bool

    @property
    def stages(self) -> int:
        return self.ranks * self.per_rank

    def numbers(self, rank: int) -> list[int]:
        """The stages on a rank of the pipeline."""
        return [number for number in range(self.stages) if self.rank_of(number) == rank]

    def rank_of(self, number: int) -> int:
        """The rank, in the pipeline, of a stage."""
        turn, place = divmod(number, self.ranks)
        return self.ranks - 1 - place if self.back and turn % 2 else place


def torch_schedule(name: str, placement: Placement, count: int) -> str:
    """The schedule that runs for *name*: with fewer micro-batches than stages 1f1b is gpipe, and torch has only that."""
    return "gpipe" if name == "1f1b" and count < placement.stages else name


class _Stage(PipelineStage):
    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False) -> Any:
        with mark(BACKWARD):
            if backward_type != "weight":
                return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
            # torch's own frees what the groups of weights share after the first of them.
            groups = bwd_kwargs["param_groups"]
            return stage_backward_weight(self.submod.parameters(), groups, retain_graph=True), None

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 also connects a rank with itself where it has two stages in a row, which gloo cannot.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def make_schedule(
    name: str, stages: Mapping[int, nn.Module], values: list[tuple[Tensor, ...]], placement: Placement, count: int,
    group: dist.ProcessGroup, loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:  # fmt: skip
    """A schedule of *count* micro-batches for this rank's *stages*; *values*, on meta: what enters each and leaves the last."""
    total, made = placement.stages, []
    for number, stage in stages.items():
        device = next(stage.parameters()).device
        made.append(_Stage(stage, number, total, device, values[number], values[number + 1], group=group))
        made[-1].stage_index_to_group_rank = {number: placement.rank_of(number) for number in range(total)}
    kind = SCHEDULES[torch_schedule(name, placement, count)]
    return kind(made[0] if name in ONE_STAGE else made, count, loss_fn=loss, scale_grads=False)  # type: ignore[arg-type]


@dataclass(frozen=True)
class StageMemory:
    """How the stages of a run use memory, and how much a device has."""

    placement: Placement
    kept: tuple[int, ...]  # Micro-batches whose activations each stage keeps (`micro_batches_kept`)
    count: int  # Micro-batches of a step
    micro_batch: int
    shards: int  # ranks over which the parameters of a stage are sharded; 1 for copies
    moments: float  # bytes of optimizer state for a trained parameter
    compute: torch.dtype  # the type of activations and of the weights that are multiplied
    recompute: str  # parallel.recompute
    capacity: float | None = None  # bytes of a device that a run may use; None is no limit
    frozen: int = MASTER  # bytes in which a frozen parameter is held
    whole: int = MASTER  # bytes in which the gradient of a sharded parameter is added up before it is reduced

    @classmethod
    def of(
        cls, config: Config, placement: Placement, micro_batch: int, data_ranks: int, shards: int, capacity: float | None = None
    ) -> StageMemory:  # fmt: skip
        """Of a run in micro-batches of *micro_batch*, *data_ranks* for each stage, *shards* of each of its copies."""
        parallel = config.parallel
        count = config.train.global_batch // data_ranks // micro_batch
        # Under autocast some activations stay fp32: there they are counted as if all did.
        compute = torch.float32 if parallel.precision == "amp_bf16" else COMPUTE_DTYPES[parallel.precision]
        return cls(
            placement, micro_batches_kept(parallel.schedule, placement, count), count, micro_batch, shards,
            state_bytes(config.optim), compute, parallel.recompute, capacity,
            2 if config.model.frozen_dtype == "bf16" else MASTER, COMPUTE_DTYPES[parallel.reduce].itemsize,
        )  # fmt: skip

    def needed(self, stage: int, cost: Cost) -> float:
        """The bytes that a stage of *cost* occupies when it occupies the most."""
        frozen = cost.parameters - cost.trained
        state = (self.frozen * frozen + (2 * MASTER + self.moments) * cost.trained) / self.shards
        return state + self.working(stage, cost) + self.activations(stage, cost) + self.boundary(stage, cost)

    def working(self, stage: int, cost: Cost) -> float:
        """Bytes of weights that are gathered or cast, and of whole gradients."""
        weight = self.compute.itemsize
        if self.shards > 1:
            # A backward pass leaves gathered weights in place until the stage's next forward pass frees them, and gradients
            # stay whole until the last micro-batch: at the end of a backward pass a stage has all of both.
            return weight * cost.parameters + self.whole * cost.trained
        # Each backward pass holds on to the weights that its forward pass cast; recomputed blocks cast them again.
        return weight * cost.parameters * (self.kept[stage] if self.recompute == "none" else 1) if weight < MASTER else 0.0

    def activations(self, stage: int, cost: Cost) -> float:
        """Bytes that are kept for backward passes, and what a recomputed block makes again."""
        return self.micro_batch * (self.kept[stage] * cost.activations + cost.recomputed)

    def boundary(self, stage: int, cost: Cost) -> float:
        """Bytes of what crosses to and from the neighbours."""
        # torch allocates the buffers of all micro-batches at once, and keeps what was sent until its gradient arrives.
        crossing = self.count * (cost.received + cost.sent) + self.kept[stage] * cost.sent
        return self.micro_batch * crossing

    def limits(self, even: Cost) -> list[float]:
        """The bytes that each stage may occupy: its device is divided as stages of the cost *even* would divide it."""
        assert self.capacity is not None
        needs = [self.needed(stage, even) for stage in range(self.placement.stages)]
        mates = [self.placement.numbers(self.placement.rank_of(stage)) for stage in range(self.placement.stages)]
        return [self.capacity * need / sum(needs[mate] for mate in there) for need, there in zip(needs, mates)]


@dataclass(frozen=True)
class Pass:
    """One pass of a micro-batch through a stage."""

    stage: int
    kind: str
    """F: forward. B: backward. I and W: backward for what entered, and then for the weights."""
    micro_batch: int


@functools.lru_cache(64)
def passes_of(name: str, placement: Placement, count: int) -> Mapping[int, Sequence[Pass]]:
    """The passes of each rank of a pipeline with *count* micro-batches, in torch's order."""
    schedule, total = torch_schedule(name, placement, count), placement.stages
    if schedule in ONE_STAGE:  # which torch runs without writing the order down
        found: dict[int, list[Pass]] = {}
        for stage in range(total):
            ahead = count if schedule == "gpipe" else min(count, total - stage)
            found[stage] = [Pass(stage, "F", number) for number in range(ahead)]
            for number in range(count - ahead):
                found[stage] += [Pass(stage, "B", number), Pass(stage, "F", ahead + number)]
            found[stage] += [Pass(stage, "B", number) for number in range(count - ahead, count)]
        return found
    # torch makes the order of the passes of all ranks out of these numbers alone.
    fields = {"num_stages": total, "group_size": placement.ranks, "group_rank": 0, "submod": None, "is_last": False}
    stages: Any = [SimpleNamespace(**fields) for _ in range(placement.per_rank)]
    return {
        rank: [
            Pass(one.stage_index, one.computation_type.value, one.microbatch_index)
            for action in actions
            if action is not None
            for one in action.sub_actions or (action,)
            if one.computation_type.value in ("F", "B", "I", "W")
        ]
        for rank, actions in SCHEDULES[schedule](stages, count).pipeline_order.items()
    }


@functools.cache
def micro_batches_kept(name: str, placement: Placement, count: int) -> tuple[int, ...]:
    """How many of *count* micro-batches each stage keeps at the moment at which the stages of its rank together keep most."""
    kept = [0] * placement.stages
    for passes in passes_of(name, placement, count).values():
        most: Counter[int] = Counter()
        now: Counter[int] = Counter()
        for one in passes:
            # A backward pass for inputs alone keeps what the one for weights needs.
            now[one.stage] += {"F": 1, "B": -1, "W": -1}.get(one.kind, 0)
            if now.total() > most.total():
                most = now.copy()
        for stage in most:
            kept[stage] = most[stage]
    return tuple(kept)
