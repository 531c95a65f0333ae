"""Optimizers by name, parameter groups, and the learning rate as a pure function of the step.

In come a model's parameters by name and the section ``optim``; out come parameter groups, an optimizer of torch's, timm's or
DeepSpeed's over them, and the learning rate of a step. Clipping and stepping are the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bigvision.config import OptimConfig
from bigvision.errors import UserError


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float | None = None, held: Mapping[str, Tensor] | None = None
) -> list[dict[str, Any]]:
    """Group the trainable parameters by what their layer's rate is multiplied with, "lr_scale", and by "weight_decay".

    Norms, biases and what the timm model excludes by name are not decayed. Each group carries "names", in the order of its
    "params", and holds either sharded or whole parameters, since a fused step takes one kind. The stem's groups come first.
    *held* are the parameters that are stepped here, where they are others than the module's own (a pipeline stage's). The rate
    is multiplied with *layer_decay* for each layer, counted as timm does, from the head (Clark et al. 2020, Bao et al. 2022).
    """
    from timm.models import group_parameters
    from timm.optim import param_groups_weight_decay

    excluded = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()  # type: ignore[operator]
    own = dict(module.named_parameters())
    names = {parameter: name for name, parameter in own.items()}
    decays = {
        names[parameter]: group["weight_decay"]
        for group in param_groups_weight_decay(module, weight_decay, no_weight_decay_list=excluded)
        for parameter in group["params"]
    }
    scales: dict[str, float] = {}
    if layer_decay is not None:
        if not hasattr(module, "group_matcher"):
            name = getattr(module, "pretrained_cfg", {}).get("architecture") or type(module).__name__
            words = f"{layer_decay} needs layers, which timm does not define for {name}: set it to null"
            raise UserError(f"optim.layer_decay: {words}")
        matcher = module.group_matcher(coarse=False)  # type: ignore[operator]
        layers = cast("dict[str, int]", group_parameters(module, matcher, reverse=True))
        top = max(layers.values())
        scales = {name: layer_decay ** (top - layer) for name, layer in layers.items()}
    held = own if held is None else held
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name in own:
        if name in decays and name in held:
            key = (scales.get(name, 1.0), decays[name], not isinstance(held[name], DTensor))
            group = groups.setdefault(key, _group([], [], *key[:2]))
            group["params"].append(held[name])
            group["names"].append(name)
    return [groups[key] for key in sorted(groups)] or [_group([], [])]  # a stage whose parameters are all frozen


def _group(params: list[Tensor], names: list[str], lr_scale: float = 1.0, weight_decay: float = 0.0) -> dict[str, Any]:
    return {"params": params, "names": names, "lr_scale": lr_scale, "weight_decay": weight_decay}


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step *step* (from 0) of *steps*: a linear warm-up from 0 to ``lr``, then constant, linear or cosine to 0.

    Cosine without restarts is that of SGDR (Loshchilov and Hutter 2017).
    """
    warmup = config.warmup if config.warmup >= 1 else config.warmup * steps
    if step + 1 < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, max(0.0, step - warmup) / max(1.0, steps - warmup))
    if config.schedule == "linear":
        return config.lr * (1.0 - progress)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig, on_cpu: bool = False) -> Optimizer:
    """Return the optimizer ``optim.name`` over :func:`parameter_groups`; clipping is the engine's.

    adamw (Loshchilov and Hutter 2019) and sgd (with Nesterov momentum) are torch's. lion (Chen et al. 2023), lamb (You et al.
    2020), adafactor (big_vision's, Zhai et al. 2022) and muon (Jordan et al. 2024) are timm's. muon takes its momentum as
    Nesterov's, steps as large as AdamW's (Liu et al. 2025), and NAdamW for what is not a matrix. For parameters *on_cpu* adamw
    is DeepSpeed's vectorised one.
    """
    if config.name == "adamw" and on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=config.lr, betas=config.betas, adamw_mode=True)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.name == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    from timm.optim import AdafactorBigVision, Lamb, Lion, Muon

    if config.name == "lion":
        # torch 2.11 cannot step sharded tensors together; 2.12 and 2.13 were not tried.
        return Lion(groups, lr=config.lr, betas=config.betas, foreach=torch.__version__ >= "2.14")
    if config.name == "lamb":
        # timm scales only the steps of decayed tensors: without decay it would be Adam.
        always = config.weight_decay == 0
        return Lamb(groups, lr=config.lr, betas=config.betas, max_grad_norm=None, always_adapt=always, foreach=True)
    if config.name == "adafactor":
        momentum, cap = config.betas
        return AdafactorBigVision(
            groups, lr=config.lr, momentum=momentum or None, momentum_dtype=torch.float32, beta2_cap=cap
        )  # fmt: skip
    if config.name == "muon":
        return Muon(groups, lr=config.lr, momentum=config.momentum, nesterov=True, betas=config.betas)
    raise ValueError(f"optim.name: {config.name} has no branch in build_optimizer")


def allocate_state(optimizer: Optimizer) -> None:
    """Create the state that the optimizer's first step would; call it before parameters have values, for they change."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    for counter in step_counters(optimizer):
        counter.zero_()


def sample_state(config: OptimConfig) -> dict[str, Any]:
    """What ``optim.name`` keeps of one parameter, a 1 x 1 matrix; "step" is its counter, where it has one for each.

    A tensor of another shape is a `TypeError`: a checkpoint could not tell whose share of the parameter it is.
    """
    parameter = torch.zeros(1, 1)
    optimizer = build_optimizer([_group([parameter], ["one"])], config)
    allocate_state(optimizer)
    for key, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and key != "step" and value.shape != parameter.shape:
            raise TypeError(f"{type(optimizer).__name__}: {key!r} does not have the parameter's shape and cannot be saved")
    return optimizer.state[parameter]


def state_layout(config: OptimConfig) -> dict[str, torch.dtype]:
    """The tensors that ``optim.name`` keeps of each parameter, for one of the parameter's shape: names and types."""
    state = sample_state(config)
    return {key: value.dtype for key, value in state.items() if isinstance(value, Tensor) and key != "step"}


def step_counters(optimizer: Optimizer) -> list[Tensor]:
    """The tensors in which the optimizer counts its steps: in each parameter's state, or one in each group (LAMB)."""
    return [place["step"] for place in (*optimizer.state.values(), *optimizer.param_groups) if "step" in place]
