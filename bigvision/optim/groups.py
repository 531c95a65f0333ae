"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group what is decayed, and what is not: norms, biases and what the timm model excludes by name.

    Each group carries "names", in the order of its "params", and holds either sharded or whole parameters, since a fused
    step takes one kind. Frozen parameters are in none.
    """
    from timm.optim import param_groups_weight_decay

    excluded = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()  # type: ignore[operator]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=excluded)
    split = []
    for group in groups:
        for sharded in (True, False):
            chosen = [p for p in group["params"] if isinstance(p, DTensor) == sharded]
            if chosen:
                split.append({**group, "params": chosen, "names": [names[id(p)] for p in chosen]})
    return split
