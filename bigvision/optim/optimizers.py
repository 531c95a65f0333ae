"""Optimizers by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bigvision.config import OptimConfig


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig, on_cpu: bool = False) -> Optimizer:
    """Return the optimizer ``optim.name`` over :func:`parameter_groups`; clipping is the engine's.

    adamw (Loshchilov and Hutter 2019) and sgd (with Nesterov momentum) are torch's. lion (Chen et al. 2023), lamb (You et al.
    2020), adafactor (big_vision's, Zhai et al. 2022) and muon (Jordan et al. 2024) are timm's. muon takes its momentum as
    Nesterov's, steps as large as AdamW's (Liu et al. 2025), and NAdamW for what is not a matrix.

    Args:
        on_cpu: the parameters that are stepped lie in CPU memory: DeepSpeed's vectorised AdamW is taken.
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
    return Muon(groups, lr=config.lr, momentum=config.momentum, nesterov=True, betas=config.betas)


def allocate_state(optimizer: Optimizer) -> None:
    """Create the state that the optimizer would create at its first step, so that it can be saved and restored before.

    The parameters' values are not kept: call it before they are filled.
    """
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


def state_layout(config: OptimConfig) -> dict[str, torch.dtype]:
    """The tensors that ``optim.name`` keeps of each parameter, for one of the parameter's shape: names and types."""
    group = {"params": [torch.zeros(1, 1)], "names": ["one"], "lr_scale": 1.0, "weight_decay": 0.0}
    optimizer = build_optimizer([group], config)
    allocate_state(optimizer)
    (state,) = optimizer.state.values() or ({},)
    return {key: value.dtype for key, value in state.items() if isinstance(value, Tensor) and key != "step"}


def step_counters(optimizer: Optimizer) -> list[Tensor]:
    """The tensors in which the optimizer counts its steps: in each parameter's state, or one in each group (LAMB)."""
    return [place["step"] for place in (*optimizer.state.values(), *optimizer.param_groups) if "step" in place]
