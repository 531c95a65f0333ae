"""Where a model is cut: where a cut is allowed, and which allowed cuts are the best."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn

from bigvision.errors import UserError
from bigvision.models.blocks import Block
from bigvision.models.exact_init import named_tensors
from bigvision.models.tracing import Cost, model_name, tensors_of
from bigvision.pipeline.cutting import SAMPLES, Flow
from bigvision.pipeline.schedules import StageMemory

SLACK = 1.01
"""How much more than the least possible the most expensive stage may cost, if less then crosses the cuts."""
STATE = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers that a forward pass changes."""


class Prices:
    """What runs of a flow's nodes cost; a node counts where its value is made or used first."""

    def __init__(self, flow: Flow, costs: dict[str, Cost], compute: torch.dtype) -> None:
        self.flow, self.compute = flow, compute
        self.costs = [Cost()] * len(flow.nodes)
        for node in flow.nodes:
            self.costs[flow.position.get(node.name, 0)] += costs[node.name]
        # The search for the best cuts asks for the same ones again and again.
        self.crossing, self.stage = functools.cache(self._crossing), functools.cache(self._stage)

    def _crossing(self, cut: int) -> float:
        """The bytes that cross *cut* for one image."""
        if cut in (0, len(self.costs)):
            return 0.0
        leaves = self.flow.crossing(cut)
        return sum(self.flow.spec(leaf).empty(SAMPLES[0], self.compute).nbytes for leaf in leaves) / SAMPLES[0]

    def _stage(self, start: int, end: int) -> Cost:
        """Of the stage between the cuts *start* and *end*."""
        return sum(self.costs[start:end], Cost(received=self.crossing(start), sent=self.crossing(end)))


def choose_cuts(model: nn.Module, blocks: list[Block], prices: Prices, memory: StageMemory) -> list[int]:
    """Cut the flow of *prices* into stages of equal work between blocks; return the positions, indices into its nodes.

    Raises:
        UserError: what is shared between blocks, or the devices' memory, leaves no such cut.
    """
    name, stages, flow = model_name(model), memory.placement.stages, prices.flow
    shared = bound_together(model, flow)
    allowed = [cut for cut in between_blocks(flow, blocks) if not any(a < cut <= b for a, b in shared.values())]
    if len(allowed) < stages - 1:
        widest = max(shared, key=lambda key: shared[key][1] - shared[key][0], default="what connects them")
        raise UserError(
            f"parallel.stages: {name} cannot be cut into {stages} stages, since {widest} is shared between its blocks: "
            "use fewer stages, or parallel.strategy fsdp"
        )
    search = functools.partial(best_cuts, [cost.work for cost in prices.costs], allowed, stages, prices.crossing)
    if memory.capacity is None:
        cuts = search()
        assert cuts is not None, "enough cuts are allowed"
        return cuts
    # Equal stages, as far as memory goes.
    whole, crossing = prices.stage(0, len(prices.costs)), max(map(prices.crossing, allowed))
    sizes = {key: getattr(whole, key) / stages for key in ("activations", "parameters", "trained")}
    even = replace(whole, **sizes, received=crossing, sent=crossing)
    limits = memory.limits(even)
    if cuts := search(lambda stage, start, end: memory.needed(stage, prices.stage(start, end)) <= limits[stage]):
        return cuts
    share, worst = max((memory.needed(stage, even) / limit, stage) for stage, limit in enumerate(limits))
    raise UserError(
        f"parallel.stages: no cut of {name} into {stages} stages fits the devices' memory (of equal stages, stage {worst} "
        f"needs {share:.2f} times what its device has for it): use more stages, parallel.recompute blocks, or smaller "
        "micro-batches"
    )


def between_blocks(flow: Flow, blocks: list[Block]) -> list[int]:
    """The positions right before and right after each block."""
    paths = {block.path for block in blocks}
    calls = [index for index, path in enumerate(flow.called) if path in paths]
    return sorted({cut for index in calls for cut in (index, index + 1) if 0 < cut < len(flow.nodes)})


def bound_together(model: nn.Module, flow: Flow) -> dict[str, tuple[int, int]]:
    """What must stay on one stage, with its first and last use: tied parameters, running statistics that move again."""
    bound = [(name, t) for name, t in named_tensors(model) if isinstance(t, nn.Parameter) or name.endswith(STATE)]
    first_names = {id(tensor): name for name, tensor in reversed(bound)}
    uses: dict[str, list[int]] = {}
    for node in flow.nodes:
        for tensor in tensors_of(node, model) if node.name in flow.position else ():
            if (name := first_names.get(id(tensor))) is not None:
                uses.setdefault(name, []).append(flow.position[node.name])
    return {name: (min(at), max(at)) for name, at in uses.items() if min(at) < max(at)}


def best_cuts(
    work: Sequence[float],
    allowed: Sequence[int],
    stages: int,
    crossing: Callable[[int], float],
    fits: Callable[[int, int, int], bool] = lambda stage, start, end: True,
) -> list[int] | None:
    """Cut the nodes ``0 .. len(work)`` into *stages* runs; return where each but the first begins, or None.

    The cost of the most expensive stage is the least possible. Among the cuts within 1 % of that, the ones with the least
    traffic are taken. Exact, by dynamic programming over the allowed positions.

    Args:
        work: what each node costs.
        allowed: positions p at which the run of nodes from p on may begin, ascending.
        crossing: what a cut at a position costs in traffic.
        fits: whether the nodes from start to end fit the device of a stage; None is returned when nothing fits.
    """
    total = [0.0, *accumulate(work)]

    def search(limit: float, value: Callable[[float, int, int], float]) -> tuple[float, list[int]] | None:
        """The cuts of the least *value* of (so far, start, end), summed up stage by stage; no stage costs more than *limit*."""
        best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(stages):
            reached = {}
            for end in allowed if stage < stages - 1 else [len(work)]:
                ways = [
                    (value(so_far, start, end), [*cuts, end])
                    for start, (so_far, cuts) in best.items()
                    if start < end and total[end] - total[start] <= limit and fits(stage, start, end)
                ]
                if ways:
                    reached[end] = min(ways, key=operator.itemgetter(0))
            best = reached
        return best.get(len(work))

    cheapest = search(float("inf"), lambda so_far, start, end: max(so_far, total[end] - total[start]))
    if cheapest is None:
        return None
    limit = cheapest[0] * SLACK
    lightest = search(limit, lambda so_far, start, end: so_far + (crossing(end) if end < len(work) else 0.0))
    assert lightest is not None
    return lightest[1][:-1]
