"""Groups, schedule and the optimizer's state before its first step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import timm
import torch
from torch import nn

from bigvision.config import OptimConfig
from bigvision.errors import UserError
from bigvision.optim import allocate_state, build_optimizer, learning_rate, parameter_groups, state_layout, step_counters
from tests.models.zoo import ZOO, Entry


def test_groups() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=24, num_heads=2)
    decayed, bare = sorted(parameter_groups(model, 0.1), key=lambda group: -group["weight_decay"])
    assert decayed["weight_decay"] == 0.1 and bare["weight_decay"] == 0.0
    assert {"blocks.0.attn.qkv.weight", "patch_embed.proj.weight", "head.weight"} <= set(decayed["names"])
    assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.attn.qkv.bias"} <= set(bare["names"])
    names = dict(model.named_parameters())
    assert sorted(decayed["names"] + bare["names"]) == sorted(names)
    assert all(names[n] is p for group in (decayed, bare) for n, p in zip(group["names"], group["params"]))


def scales(model: nn.Module, layer_decay: float | None, weight_decay: float = 0.1) -> dict[str, float]:
    """The scale of each parameter, after a look that the groups hold each trainable one once and differ from each other."""
    groups = parameter_groups(model, weight_decay, layer_decay)
    found = {name: group["lr_scale"] for group in groups for name in group["names"]}
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(len(group["names"]) for group in groups) == len(names) and found.keys() == names.keys()
    assert all(names[name] is p for group in groups for name, p in zip(group["names"], group["params"], strict=True))
    kinds = [(group["lr_scale"], group["weight_decay"]) for group in groups]
    assert kinds == sorted(set(kinds))
    return found


def test_layer_decay_of_vit() -> None:
    """Five layers: the embedding, three blocks, of which the last takes the final norm, and the head."""
    model = timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2)
    assert set(scales(model, None).values()) == {1.0}
    found = scales(model, 0.5)
    expected = {"blocks.0": 0.125, "blocks.1": 0.25, "blocks.2": 0.5, "norm.": 0.5, "head": 1.0}
    for name, scale in found.items():
        assert scale == next((value for start, value in expected.items() if name.startswith(start)), 0.0625), name
    groups = parameter_groups(model, 0.1, 0.5)
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [
        (scale, decay) for scale in (0.0625, 0.125, 0.25, 0.5, 1.0) for decay in (0.0, 0.1)
    ]
    assert groups[0]["names"] == ["cls_token", "pos_embed", "patch_embed.proj.bias"]
    assert groups[1]["names"] == ["patch_embed.proj.weight"]


def test_layer_decay_of_convnext() -> None:
    """Seven layers: a downsampling belongs to the first block of its stage."""
    model = timm.create_model("convnext_atto", depths=[1, 1, 2, 1], dims=[8, 12, 16, 20])
    found = scales(model, 0.5)
    expected = {
        "stem": 0.5**6, "stages.0.": 0.5**5, "stages.1.": 0.5**4, "stages.2.downsample": 0.5**3, "stages.2.blocks.0": 0.5**3,
        "stages.2.blocks.1": 0.5**2, "stages.3.": 0.5, "head.": 1.0,
    }  # fmt: skip
    assert {name: next(v for start, v in expected.items() if name.startswith(start)) for name in found} == found
    sizes = {group["lr_scale"]: 0 for group in parameter_groups(model, 0.1, 0.5)}
    for group in parameter_groups(model, 0.1, 0.5):
        sizes[group["lr_scale"]] += sum(parameter.numel() for parameter in group["params"])
    assert sizes[1.0] == sum(parameter.numel() for parameter in model.head.parameters())
    assert sum(sizes.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "test_byobnet"])
def test_layer_decay_leaves_weight_decay_alone(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    plain, scaled = (
        {name: group["weight_decay"] for group in parameter_groups(model, 0.1, decay) for name in group["names"]}
        for decay in (None, 0.75)
    )
    assert plain == scaled and set(plain.values()) == {0.0, 0.1}
    assert len(parameter_groups(model, 0.1, 1.0)) == 2
    assert {group["weight_decay"] for group in parameter_groups(model, 0.0, 0.75)} == {0.0}


def test_layer_decay_of_frozen_and_tied_parameters() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2)
    model.patch_embed.requires_grad_(False)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    found = scales(model, 0.5)
    assert found["cls_token"] == 0.125 and "patch_embed.proj.weight" not in found
    assert found["blocks.0.mlp.fc1.weight"] == 0.25 and "blocks.1.mlp.fc1.weight" not in found


def test_layer_decay_is_refused_without_layers() -> None:
    with torch.device("meta"):
        model = timm.create_model("pit_xs_224")
    with pytest.raises(UserError, match=r"optim\.layer_decay: 0\.75 .* pit_xs_224: set it to null"):
        parameter_groups(model, 0.1, 0.75)
    with pytest.raises(UserError, match="Linear"):
        parameter_groups(nn.Linear(2, 2), 0.1, 0.75)


@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.module)
def test_layer_decay_of_every_module(entry: Entry) -> None:
    with torch.device("meta"):
        model = timm.create_model(entry.name, num_classes=10, **entry.options)
    if entry.module in {"csatv2", "metaformer", "pit"}:
        with pytest.raises(UserError):
            scales(model, 0.75)
        return
    found = scales(model, 0.75)
    # A model may have two classifiers, or a stem of several branches.
    for key, scale in (("classifier", 1.0), ("first_conv", min(found.values()))):
        given = model.pretrained_cfg[key]
        starts = (given,) if isinstance(given, str) else tuple(given)
        chosen = [value for name, value in found.items() if name.startswith(starts)]
        assert chosen and set(chosen) == {scale}, key
    assert len(set(found.values())) > 2 and max(found.values()) == 1.0


def test_the_rate_rises_and_falls_as_the_schedule_says() -> None:
    config = OptimConfig(lr=2.0, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and max(rates) == 2.0
    assert all(a < b for a, b in pairwise(rates[:10])) and all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1.0) and 0 < rates[99] < 0.01
    assert [learning_rate(OptimConfig(lr=2.0, warmup=4), step, 100) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    linear = OptimConfig(lr=2.0, warmup=2, schedule="linear")
    assert [learning_rate(linear, step, 6) for step in range(6)] == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    constant = OptimConfig(lr=2.0, warmup=0, schedule="constant")
    assert {learning_rate(constant, step, 10) for step in range(10)} == {2.0}
    assert all(math.isfinite(learning_rate(config, step, 1)) for step in range(3))


# Of two matrices and two biases: each, none, each group, or what muon leaves to NAdamW (a 20 x 3 matrix is too narrow for it).
COUNTERS = {"adamw": 4, "sgd": 0, "lion": 0, "lamb": 2, "adafactor": 4, "muon": 3}


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "adafactor", "muon"])
def test_state_made_beforehand_changes_nothing(name: str) -> None:
    models = []
    for early in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 20), torch.nn.Linear(20, 16))
        values = [p.detach().clone() for p in model.parameters()]
        optimizer = build_optimizer(parameter_groups(model, 0.1), OptimConfig(name=name, lr=0.1))
        if early:
            allocate_state(optimizer)
            assert all(p.grad is None and len(optimizer.state[p]) > 0 for p in model.parameters())
            assert [int(counter) for counter in step_counters(optimizer)] == [0] * COUNTERS[name]
            with torch.no_grad():
                for parameter, value in zip(model.parameters(), values):
                    parameter.copy_(value)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        assert [int(counter) for counter in step_counters(optimizer)] == [3] * COUNTERS[name]
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


def test_an_optimizer_that_cannot_be_saved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's NAdam keeps a number for each parameter, which is no share of one."""
    monkeypatch.setattr("bigvision.optim.build_optimizer", lambda groups, config: torch.optim.NAdam(groups))
    with pytest.raises(TypeError, match="NAdam: 'mu_product'"):
        state_layout(OptimConfig())


def test_a_name_without_a_branch_is_no_muon() -> None:
    with pytest.raises(ValueError, match="nadam has no branch"):
        state_layout(OptimConfig(name="nadam"))  # type: ignore[arg-type]
