"""Where a model is cut: where a cut is allowed, and which allowed cuts are the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase as NormBase

from bigvision.errors import UserError
from bigvision.models.blocks import Block
from bigvision.models.costs import Cost
from bigvision.models.tracing import model_name
from bigvision.pipeline.cutting import SAMPLES, Flow
from bigvision.pipeline.memory import StageMemory

SLACK = 1.01
"""How much more than the least possible the most expensive stage may cost, if less then crosses the cuts."""


class Prices:
    """What runs of a flow's nodes cost; a node counts where its value is made or used first."""

    def __init__(self, flow: Flow, costs: dict[str, Cost], compute: torch.dtype) -> None:
        self.flow, self.compute = flow, compute
        self.costs = [Cost()] * len(flow.nodes)
        self._crossing = {0: 0.0, len(flow.nodes): 0.0}
        for node in flow.nodes:
            self.costs[flow.position.get(node.name, 0)] += costs[node.name]

    def crossing(self, cut: int) -> float:
        """The bytes that cross *cut* for one image."""
        if cut not in self._crossing:
            leaves = self.flow.crossing([cut])[0]
            self._crossing[cut] = sum(self.flow.spec(leaf).nbytes(SAMPLES[0], self.compute) for leaf in leaves) / SAMPLES[0]
        return self._crossing[cut]

    def stage(self, start: int, end: int) -> Cost:
        """Of the stage between the cuts *start* and *end*."""
        return sum(self.costs[start:end], Cost(received=self.crossing(start), sent=self.crossing(end)))

    def even(self, stages: int, crossing: float) -> Cost:
        """Of one of *stages* equal stages, as far as memory goes."""
        whole = self.stage(0, len(self.costs))
        sizes = {key: getattr(whole, key) / stages for key in ("activations", "parameters", "trained")}
        return replace(whole, **sizes, received=crossing, sent=crossing)


def choose_cuts(
    model: nn.Module, flow: Flow, blocks: list[Block], prices: Prices, stages: int, memory: StageMemory | None
) -> list[int]:
    """Cut *flow* into *stages* of equal work between blocks; return the positions, indices into its nodes.

    Raises:
        UserError: what is shared between blocks, or the devices' memory, leaves no such cut.
    """
    name = model_name(model)
    shared = bound_together(model, flow)
    allowed = [cut for cut in between_blocks(flow, blocks) if not any(a < cut <= b for a, b in shared.values())]
    work = [cost.work for cost in prices.costs]
    if memory is None or memory.capacity is None:
        cuts, needs = best_cuts(work, allowed, stages, prices.crossing), ""
    else:
        even = prices.even(stages, max(map(prices.crossing, allowed), default=0.0))
        limits = memory.limits(even)

        def fits(stage: int, start: int, end: int) -> bool:
            return memory.needed(stage, prices.stage(start, end)) <= limits[stage]

        cuts = best_cuts(work, allowed, stages, prices.crossing, fits)
        share, worst = max((memory.needed(stage, even) / limit, stage) for stage, limit in enumerate(limits))
        needs = f" (of equal stages, stage {worst} needs {share:.2f} times what its device has for it)"
    if cuts is not None:
        return cuts
    if best_cuts(work, allowed, stages, prices.crossing) is None:
        widest = max(shared, key=lambda key: shared[key][1] - shared[key][0], default="what connects them")
        raise UserError(
            f"parallel.stages: {name} cannot be cut into {stages} stages, since {widest} is shared between its blocks: "
            "use fewer stages, or parallel.strategy fsdp"
        )
    raise UserError(
        f"parallel.stages: no cut of {name} into {stages} stages fits the devices' memory{needs}: use more stages, "
        "parallel.recompute blocks, or smaller micro-batches"
    )


def between_blocks(flow: Flow, blocks: list[Block]) -> list[int]:
    """The positions right before and right after each block."""
    paths = {block.path for block in blocks}
    calls = [index for index, node in enumerate(flow.nodes) if node.op == "call_module" and str(node.target) in paths]
    return sorted({cut for index in calls for cut in (index, index + 1) if 0 < cut < len(flow.nodes)})


def bound_together(model: nn.Module, flow: Flow) -> dict[str, tuple[int, int]]:
    """What must stay on one stage, with its first and last use: tied parameters, modules with state that are called again."""
    first_names: dict[int, str] = {}
    tied_to = {name: first_names.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False)}
    uses: dict[str, list[int]] = {}
    for node in flow.nodes:
        if (at := flow.position.get(node.name)) is None:
            continue
        target = str(node.target)
        if node.op == "get_attr" and target in tied_to:
            uses.setdefault(tied_to[target], []).append(at)
        elif node.op == "call_module":
            module = model.get_submodule(target)
            for name, _ in module.named_parameters(remove_duplicate=False):
                uses.setdefault(tied_to[f"{target}.{name}"], []).append(at)
            if any(isinstance(part, NormBase) and part.track_running_stats for part in module.modules()):
                uses.setdefault(target, []).append(at)
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
    ends = [*allowed, len(work)]

    def cost(start: int, end: int) -> float:
        return total[end] - total[start]

    def search(limit: float, value: Callable[[float, int, int], float]) -> tuple[float, list[int]] | None:
        """The cuts of the least *value* of (so far, start, end), summed up stage by stage; no stage costs more than *limit*."""
        states: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(stages):
            reached: dict[int, tuple[float, list[int]]] = {}
            for end in ends if stage < stages - 1 else [len(work)]:
                for start, (so_far, cuts) in states.items():
                    if start >= end or cost(start, end) > limit or not fits(stage, start, end):
                        continue
                    new = value(so_far, start, end)
                    if end not in reached or new < reached[end][0]:
                        reached[end] = (new, [*cuts, end])
            states = reached
        return states.get(len(work))

    cheapest = search(float("inf"), lambda so_far, start, end: max(so_far, cost(start, end)))
    if cheapest is None:
        return None
    limit = cheapest[0] * SLACK
    lightest = search(limit, lambda so_far, start, end: so_far + (crossing(end) if end < len(work) else 0.0))
    assert lightest is not None
    return lightest[1][:-1]
