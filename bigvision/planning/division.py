"""How the engine divides a model: into units that FSDP gathers together, and into the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from bigvision.config import SPLIT_BACKWARD, Config
from bigvision.engine.parallelize import units_of
from bigvision.models import find_blocks
from bigvision.models.tracing import Cost
from bigvision.pipeline import Placement, StageMemory
from bigvision.pipeline.stages import Candidate, cut
from bigvision.planning.profile import Part, Profile, StateTensor
from bigvision.planning.state import Layout
from bigvision.planning.zero3 import with_outer


def units_of_parts(profile: Profile, config: Config) -> list[list[int]]:
    """The blocks of *profile* that fsdp gathers together, by their places among its parts."""
    blocks = [number for number, part in enumerate(profile.parts) if part.path]
    sizes = [profile.parts[number].numel for number in blocks]
    return [[blocks[place] for place in unit] for unit in units_of(sizes, config, profile.device)]


@dataclass(frozen=True)
class Stages:
    """The stages of a pipeline as the engine cuts them."""

    costs: list[Cost]
    owners: dict[str, list[int]]
    """The stages with each parameter and buffer."""
    shares: list[dict[int, float]]
    """Of each stage the parts of the profile that it runs, and which share of each one's work. A cut may lie inside a part."""
    units: list[list[list[StateTensor]]]
    """Of each stage the tensors that FSDP gathers together: unit by unit, and last those outside of blocks."""
    memory: StageMemory
    returned: list[float]
    """Bytes of the gradients that come back to each stage for an image: none of what needs no gradient."""

    def received(self, stage: int) -> float:
        """Bytes that a stage receives for one image."""
        return self.costs[stage].received + self.returned[stage]

    def tensors(self, stages: Iterable[int]) -> list[StateTensor]:
        """Those of several stages, each once."""
        found = {tensor.name: tensor for stage in stages for unit in self.units[stage] for tensor in unit}
        return list(found.values())


def cut_stages(profile: Profile, config: Config, layout: Layout) -> Stages:
    """Where the engine cuts the model of *profile*. `DoesNotFit` where memory has a limit, and no cut keeps to it."""
    assert profile.model is not None
    placement = Placement(layout.stages, layout.stages_per_rank, config.parallel.schedule in SPLIT_BACKWARD)
    memory = StageMemory.of(config, placement, layout.micro_batch(config), layout.data_ranks, layout.shards, layout.capacity)
    found, key = _cuts.setdefault(profile.model, {}), (memory, config.parallel.unit_size)
    if key not in found:
        model, device = profile.model, torch.device(profile.device)
        if "blocks" not in found:
            found["blocks"] = find_blocks(model, profile.image[1:])
        best = cut(model, found["blocks"], profile.image, device, memory, found.setdefault("flows", {}))
        # Most micro-batches are cut alike.
        alike = placement, memory.compute, memory.recompute, config.parallel.unit_size, tuple(best.cuts), tuple(best.inside)
        if alike not in found:
            owners, returned = best.owners(model), [best.prices.returning(end) for _, end in best.bounds]
            units = [_units_of_stage(profile, config, best, owners, stage) for stage in range(placement.stages)]
            found[alike] = Stages(best.costs, owners, _shares(profile.parts, best), units, memory, returned)
        found[key] = replace(found[alike], memory=memory)
    return found[key]


_cuts: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()
"""Of each model its blocks and the plans so far: ranks of one mesh share theirs."""


def _shares(parts: Sequence[Part], best: Candidate) -> list[dict[int, float]]:
    """Of each stage of *best* its parts with their shares, by the work of the trace's nodes."""
    places = list(_parts_of_nodes(parts, best.prices.flow.nodes))
    total = dict.fromkeys(range(len(parts)), 0.0)
    for place, cost in zip(places, best.prices.costs):
        total[place] += cost.work
    found: list[dict[int, float]] = []
    for start, end in best.bounds:
        mine: dict[int, float] = {}
        for place, cost in zip(places[start:end], best.prices.costs[start:end]):
            if total[place]:
                mine[place] = mine.get(place, 0.0) + cost.work / total[place]
        found.append(mine)
    # What the trace has no work for, such as the loss of a model without a head, runs where the part before it ends.
    before = 0
    for place, work in total.items():
        if work:
            before = max(before, *(stage for stage, mine in enumerate(found) if place in mine))
        else:
            found[before][place] = 1.0
    return found


def _parts_of_nodes(parts: Sequence[Part], nodes: Sequence[fx.Node]) -> Iterator[int]:
    """The place of each node's part: its block's, or that of what lies behind the last block that began."""
    blocks = {part.path: place for place, part in enumerate(parts) if part.path}
    outside = 0
    for node in nodes:
        path = str(node.target) if node.op == "call_module" else next(reversed(node.meta.get("nn_module_stack") or [""]))
        block = next((outer for outer in with_outer(path) if outer in blocks), None)
        if block is not None:
            outside = min(blocks[block] + 1, len(parts) - 1)
        yield outside if block is None else blocks[block]


def _units_of_stage(
    profile: Profile, config: Config, best: Candidate, owners: dict[str, list[int]], stage: int
) -> list[list[StateTensor]]:  # fmt: skip
    """The tensors of *stage* of *best* by unit; of a block that is cut in two its parts are the blocks."""
    start, end = best.bounds[stage]
    called = set(best.prices.flow.called[start:end])
    blocks = [block for block in best.blocks if block.path in called]
    rest = {tensor.name: tensor for tensor in profile.tensors if stage in owners[tensor.name]}
    found: list[list[StateTensor]] = []
    for unit in units_of([block.parameters for block in blocks], config, profile.device):
        inside = tuple(f"{blocks[place].path}." for place in unit)
        found.append([rest.pop(name) for name in list(rest) if name.startswith(inside)])
    return [*found, list(rest.values())]
