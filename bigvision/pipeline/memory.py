"""What a stage needs of its device's memory in a training step, under the schedules of ``torch.distributed.pipelining``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from bigvision.config import ONE_STAGE, Config
from bigvision.models.costs import Cost
from bigvision.optim import state_layout
from bigvision.pipeline.schedules import SCHEDULES, Placement, torch_schedule
from bigvision.runtime import Runtime

USABLE = 0.9
"""Of a device's memory; the rest is for the context, libraries' workspaces and fragmentation."""
MASTER = 4
"""Bytes of an fp32 value: master weights, gradients."""


@dataclass(frozen=True)
class StageMemory:
    """How the stages of a run use memory, and how much a device has."""

    placement: Placement
    kept: list[int]
    """Micro-batches whose activations each stage keeps (`micro_batches_kept`)."""
    count: int
    """Micro-batches of a step."""
    micro_batch: int
    shards: int
    """Ranks over which the parameters of a stage are sharded; 1 for copies."""
    moments: int
    """Bytes of optimizer state for a trained parameter."""
    compute: torch.dtype
    """The type of activations and of the weights that are multiplied."""
    recompute: bool
    capacity: float | None = None
    """Bytes of a device that a run may use; None is no limit."""

    @classmethod
    def of(cls, config: Config, runtime: Runtime, placement: Placement, micro_batch: int) -> StageMemory:
        """Of a run in micro-batches of *micro_batch* samples."""
        parallel = config.parallel
        count = config.train.global_batch // runtime.data_ranks // micro_batch
        # Under autocast some activations stay fp32: there they are counted as if all did.
        compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(parallel.precision, torch.float32)
        moments = sum(dtype.itemsize for dtype in state_layout(config.optim).values())
        capacity = None
        if runtime.device.type == "cuda":
            capacity = USABLE * torch.cuda.get_device_properties(runtime.device).total_memory
        return cls(
            placement, micro_batches_kept(parallel.schedule, placement, count), count, micro_batch,
            runtime.mesh["shard"].size(), moments, compute, parallel.recompute != "none", capacity,
        )  # fmt: skip

    def needed(self, stage: int, cost: Cost) -> float:
        """The bytes that a stage of *cost* occupies when it occupies the most."""
        kept, weight = self.kept[stage], self.compute.itemsize
        state = (MASTER * cost.parameters + (MASTER + self.moments) * cost.trained) / self.shards
        if self.shards > 1:
            # torch gathers a stage's weights once in a step and scatters its gradients after the last micro-batch.
            state += weight * cost.parameters + MASTER * cost.trained
        elif weight < MASTER:
            # Each backward pass holds on to the weights that its forward pass cast; recomputed blocks cast them again.
            state += weight * cost.parameters * (1 if self.recompute else kept)
        # torch allocates the buffers of all micro-batches at once, and keeps what was sent until its gradient arrives.
        crossing = self.count * (cost.received + cost.sent) + kept * cost.sent
        return state + self.micro_batch * (kept * cost.activations + cost.recomputed + crossing)

    def limits(self, even: Cost) -> list[float]:
        """The bytes that each stage may occupy: its device is divided as stages of the cost *even* would divide it."""
        assert self.capacity is not None
        needs = [self.needed(stage, even) for stage in range(self.placement.stages)]
        mates = [self.placement.numbers(self.placement.rank_of(stage)) for stage in range(self.placement.stages)]
        return [self.capacity * need / sum(needs[mate] for mate in there) for need, there in zip(needs, mates)]


def micro_batches_kept(name: str, placement: Placement, count: int) -> list[int]:
    """How many of a step's *count* micro-batches each stage keeps, at the moment at which the stages of its rank together
    keep the most."""
    schedule, total = torch_schedule(name, placement, count), placement.stages
    if schedule in ONE_STAGE:
        return [count if schedule == "gpipe" else min(count, total - stage) for stage in range(total)]
    # torch makes the order of the passes of all ranks out of these numbers alone.
    fields = {"num_stages": total, "group_size": placement.ranks, "group_rank": 0, "submod": None, "is_last": False}
    stages: Any = [SimpleNamespace(**fields) for _ in range(placement.per_rank)]
    kept = [0] * total
    for actions in SCHEDULES[schedule](stages, count).pipeline_order.values():
        most: Counter[int] = Counter()
        now: Counter[int] = Counter()
        for action in (one for each in actions if each is not None for one in each.sub_actions or (each,)):
            # A backward pass for inputs alone keeps what the one for weights needs.
            now[action.stage_index] += {"F": 1, "B": -1, "W": -1}.get(action.computation_type.value, 0)
            if now.total() > most.total():
                most = now.copy()
        for stage in most:
            kept[stage] = most[stage]
    return kept
