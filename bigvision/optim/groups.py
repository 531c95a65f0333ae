"""Which parameters are decayed, and how fast each layer learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bigvision.errors import UserError


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float | None = None, held: Mapping[str, Tensor] | None = None
) -> list[dict[str, Any]]:
    """Group the trainable parameters by what their layer's rate is multiplied with, "lr_scale", and by "weight_decay".

    Norms, biases and what the timm model excludes by name are not decayed. Each group carries "names", in the order of its
    "params", and holds either sharded or whole parameters, since a fused step takes one kind. The stem's groups come first.

    Args:
        held: the parameters that are stepped here, where they are others than the module's own (a pipeline stage's).

    Raises:
        UserError: *layer_decay* for a model that does not name its layers.
    """
    from timm.optim import param_groups_weight_decay

    excluded = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()  # type: ignore[operator]
    own = dict(module.named_parameters())
    names = {parameter: name for name, parameter in own.items()}
    decays = {
        names[parameter]: group["weight_decay"]
        for group in param_groups_weight_decay(module, weight_decay, no_weight_decay_list=excluded)
        for parameter in group["params"]
    }
    scales = dict.fromkeys(own, 1.0) if layer_decay is None else layer_scales(module, layer_decay)
    held = own if held is None else held
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name in own:
        if name in decays and name in held:
            parameter = held[name]
            key = (scales[name], decays[name], not isinstance(parameter, DTensor))
            empty = {"params": [], "names": [], "lr_scale": key[0], "weight_decay": key[1]}
            group = groups.setdefault(key, empty)
            group["params"].append(parameter)
            group["names"].append(name)
    nothing = {"params": [], "names": [], "lr_scale": 1.0, "weight_decay": 0.0}  # a stage whose parameters are all frozen
    return [groups[key] for key in sorted(groups)] or [nothing]


def layer_scales(module: nn.Module, decay: float) -> dict[str, float]:
    """Return *decay* to the power of a parameter's distance, in layers, from the head, which has 1 (Clark et al. 2020).

    Layers are counted as timm does: the stem, each block, the head (Bao et al. 2022).

    Raises:
        UserError: the model does not name its layers.
    """
    from timm.models import group_parameters

    if not hasattr(module, "group_matcher"):
        name = getattr(module, "pretrained_cfg", {}).get("architecture") or type(module).__name__
        raise UserError(f"optim.layer_decay: {decay} needs layers, which timm does not define for {name}: set it to null")
    matcher = module.group_matcher(coarse=False)  # type: ignore[operator]
    layers = cast("dict[str, int]", group_parameters(module, matcher, reverse=True))
    top = max(layers.values())
    return {name: decay ** (top - layer) for name, layer in layers.items()}
