"""Which rank has which stage, and the schedules of ``torch.distributed.pipelining`` by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining._backward import stage_backward_weight

from bigvision.config import ONE_STAGE

SCHEDULES = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}


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
    """The schedule that runs for the schedule *name*: with fewer micro-batches than stages 1f1b is gpipe, and torch has only
    that."""
    return "gpipe" if name == "1f1b" and count < placement.stages else name


class _Stage(PipelineStage):
    def backward_maybe_with_nosync(self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False) -> Any:
        if backward_type != "weight":
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        # torch's own frees what the groups of weights share after the first of them.
        groups = bwd_kwargs["param_groups"]
        return stage_backward_weight(self.submod.parameters(), groups, retain_graph=True), None

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 also connects a rank with itself where it has two stages in a row, which gloo cannot.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


def make_schedule(
    name: str,
    stages: Mapping[int, nn.Module],
    values: list[tuple[Tensor, ...]],
    placement: Placement,
    count: int,
    group: dist.ProcessGroup,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Any:
    """A schedule of *count* micro-batches for this rank's *stages*.

    Args:
        values: what enters each stage and what leaves the last, on meta: nothing has to be tried out or sent beforehand.
    """
    total, made = placement.stages, []
    for number, stage in stages.items():
        device = next(stage.parameters()).device
        made.append(_Stage(stage, number, total, device, values[number], values[number + 1], group=group))
        made[-1].stage_index_to_group_rank = {number: placement.rank_of(number) for number in range(total)}
    kind = SCHEDULES[torch_schedule(name, placement, count)]
    return kind(made[0] if name in ONE_STAGE else made, count, loss_fn=loss, scale_grads=False)  # type: ignore[arg-type]
