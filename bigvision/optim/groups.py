"""Which parameters are decayed."""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """At most two groups: what is decayed, and what is not: norms, biases and what the timm model excludes by name.

    Each group carries "names", in the order of its "params". Frozen parameters are in none.
    """
    from timm.optim import param_groups_weight_decay

    excluded = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()  # type: ignore[operator]
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = param_groups_weight_decay(module, weight_decay, no_weight_decay_list=excluded)
    return [{**group, "names": [names[id(p)] for p in group["params"]]} for group in groups if group["params"]]
