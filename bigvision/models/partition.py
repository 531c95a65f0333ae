"""Where a model may be cut, and where it is cut best."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _NormBase as NormBase

from bigvision.errors import UserError
from bigvision.models.balance import best_cuts
from bigvision.models.blocks import Block
from bigvision.models.costs import Cost
from bigvision.models.cutting import SAMPLES, Flow
from bigvision.models.tracing import model_name, size

Fits = Callable[[int, int, float], bool]
"""(stage, its parameters, its activation bytes per image) to whether the stage's device holds it."""


def choose_cuts(
    model: nn.Module, flow: Flow, blocks: list[Block], costs: dict[str, Cost], stages: int, fits: Fits | None
) -> list[int]:
    """Cut *flow* into *stages* of equal work between blocks; return the positions, indices into its nodes.

    Raises:
        UserError: what is shared between blocks, or the devices' memory, leaves no such cut.
    """
    name = model_name(model)
    shared = bound_together(model, flow)
    allowed = [cut for cut in between_blocks(flow, blocks) if not any(a < cut <= b for a, b in shared.values())]
    per_node = [Cost()] * len(flow.nodes)
    sizes = [0] * len(flow.nodes)
    for node in flow.nodes:
        at = max(flow.position.get(node.name, 0), 0)
        per_node[at] = per_node[at] + costs[node.name]
        if node.op == "call_module":
            sizes[at] += size(model.get_submodule(str(node.target)))
    traffic = {
        cut: float(sum(flow.spec(leaf).nbytes(SAMPLES[0]) for leaf in leaves))
        for cut, leaves in zip(allowed, flow.crossing(allowed))
    }

    def held(part: int, start: int, end: int) -> bool:
        return fits is None or fits(part, sum(sizes[start:end]), sum(cost.activations for cost in per_node[start:end]))

    work = [cost.work for cost in per_node]
    cuts = best_cuts(work, allowed, stages, traffic.__getitem__, held)
    if cuts is not None:
        return cuts
    if best_cuts(work, allowed, stages, traffic.__getitem__) is None:
        widest = max(shared, key=lambda key: shared[key][1] - shared[key][0], default="what connects them")
        raise UserError(
            f"parallel.stages: {name} cannot be cut into {stages} stages, since {widest} is shared between its blocks: "
            "use fewer stages, or parallel.strategy fsdp"
        )
    raise UserError(
        f"parallel.stages: no cut of {name} into {stages} stages fits the devices' memory: use more stages, "
        "parallel.recompute blocks, or smaller micro-batches"
    )


def between_blocks(flow: Flow, blocks: list[Block]) -> list[int]:
    """The positions right before and right after each block."""
    paths = {block.path for block in blocks}
    calls = [index for index, node in enumerate(flow.nodes) if node.op == "call_module" and str(node.target) in paths]
    return sorted({cut for index in calls for cut in (index, index + 1) if 0 < cut < len(flow.nodes)})


def bound_together(model: nn.Module, flow: Flow) -> dict[str, tuple[int, int]]:
    """What must stay on one stage, with its first and last use: tied parameters, modules with state that are called again."""
    names: dict[int, str] = {}
    known: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known[name] = names.setdefault(id(parameter), name)
    uses: dict[str, list[int]] = {}
    for node in flow.nodes:
        if (at := flow.position.get(node.name)) is None:
            continue
        target = str(node.target)
        if node.op == "get_attr" and target in known:
            uses.setdefault(known[target], []).append(at)
        elif node.op == "call_module":
            module = model.get_submodule(target)
            for name, _ in module.named_parameters(remove_duplicate=False):
                uses.setdefault(known[f"{target}.{name}"], []).append(at)
            if any(isinstance(part, NormBase) and part.track_running_stats for part in module.modules()):
                uses.setdefault(target, []).append(at)
    return {name: (min(at), max(at)) for name, at in uses.items() if min(at) < max(at)}
