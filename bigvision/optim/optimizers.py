"""Optimizers by name."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from bigvision.config import OptimConfig


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig, on_cpu: bool = False) -> Optimizer:
    """Return AdamW (Loshchilov and Hutter 2019) or SGD with Nesterov momentum over :func:`parameter_groups`.

    Args:
        on_cpu: the parameters that are stepped lie in CPU memory: DeepSpeed's vectorised AdamW is taken.
    """
    if config.name == "adamw" and on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=config.lr, betas=config.betas, adamw_mode=True)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    momentum = config.momentum
    # Not fused: that step has no form for sharded tensors.
    return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, foreach=True)


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
            if isinstance(value, torch.Tensor):
                value.zero_()
