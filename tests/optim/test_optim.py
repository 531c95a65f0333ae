"""Groups, schedule and the optimizer's state before its first step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import timm
import torch

from bigvision.config import OptimConfig
from bigvision.optim import allocate_state, build_optimizer, learning_rate, parameter_groups


def test_groups() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2)
    decayed, bare = sorted(parameter_groups(model, 0.1), key=lambda group: -group["weight_decay"])
    assert decayed["weight_decay"] == 0.1 and bare["weight_decay"] == 0.0
    assert {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "head.weight"} <= set(decayed["names"])
    assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.attn.qkv.bias"} <= set(bare["names"])
    names = dict(model.named_parameters())
    assert sorted(decayed["names"] + bare["names"]) == sorted(names)
    assert all(names[n] is p for group in (decayed, bare) for n, p in zip(group["names"], group["params"]))


def test_schedule() -> None:
    config = OptimConfig(lr=2.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and max(rates) == 2.0
    assert all(a < b for a, b in pairwise(rates[:10])) and all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert [learning_rate(OptimConfig(lr=2.0, warmup=4), step, 100) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    constant = OptimConfig(lr=2.0, warmup=0, schedule="constant")
    assert {learning_rate(constant, step, 10) for step in range(10)} == {2.0}
    assert all(math.isfinite(learning_rate(config, step, 1)) for step in range(3))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_made_beforehand_changes_nothing(name: str) -> None:
    models = []
    for early in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        values = [p.detach().clone() for p in model.parameters()]
        optimizer = build_optimizer(model, OptimConfig(name=name, lr=0.1))
        if early:
            allocate_state(optimizer)
            assert all(p.grad is None and len(optimizer.state[p]) > 0 for p in model.parameters())
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), values):
                    parameter.copy_(value)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))
