"""Groups, schedule and the optimizer's state before its first step."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import timm
import torch
from torch import nn

from bigvision.config import GroupConfig, OptimConfig, peak_rate
from bigvision.errors import UserError
from bigvision.optim import (
    Setting,
    allocate_state,
    build_optimizer,
    freeze,
    group_table,
    learning_rate,
    parameter_groups,
    settings,
    state_layout,
    step_counters,
)
from tests.models.zoo import SWEEP, Entry


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


def small_vit() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_tiny_patch16_224", depth=3, embed_dim=24, num_heads=2)


def test_the_last_rule_that_matches_wins_after_layer_decay() -> None:
    rules = [
        GroupConfig("*", weight_decay=0.3), GroupConfig("blocks.[01]", 2.0), GroupConfig("*.attn.*.bias", weight_decay=0.2),
        GroupConfig("head", 10.0), GroupConfig("pos_embed", 0.5, 0.1),
    ]  # fmt: skip
    model = small_vit()
    found = settings(model, 0.05, 0.5, rules)
    assert {name: (one.lr_scale, one.weight_decay) for name, one in found.items() if one.rule != 0} == {
        **{name: (0.5**3 * 2, one) for name, one in of_block(0, "mlp", "norm", "weight").items()},
        **{name: (0.5**2 * 2, one) for name, one in of_block(1, "mlp", "norm", "weight").items()},
        **{f"blocks.{n}.attn.{kind}.bias": (0.5 ** (3 - n), 0.2) for n in range(3) for kind in ("qkv", "proj")},
        "head.weight": (10.0, 0.05), "head.bias": (10.0, 0.0), "pos_embed": (0.5**4 * 0.5, 0.1),
    }  # fmt: skip
    assert found["norm.bias"] == Setting(0.5, 0.3, 0), "a decay by name is used for norms and biases too"
    groups = parameter_groups(model, 0.05, 0.5, rules=rules)
    assert {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]} == {
        name: (one.lr_scale, one.weight_decay) for name, one in found.items()
    }


def of_block(number: int, *words: str) -> dict[str, float]:
    """The parameters of a block with one of *words* in their names, and their decay."""
    names = [name for name, _ in small_vit().named_parameters() if name.startswith(f"blocks.{number}.")]
    return {n: 0.0 if "norm" in n or n.endswith("bias") else 0.05 for n in names if any(word in n for word in words)}


def test_a_tied_parameter_goes_by_each_of_its_names() -> None:
    model = small_vit()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight  # pyright: ignore
    assert settings(model, 0.1, None, [GroupConfig("blocks.1.mlp.fc1", 3.0)])["blocks.0.mlp.fc1.weight"].lr_scale == 3.0


@pytest.mark.parametrize(
    ("name", "trainable", "trained"),
    [
        ("vit_tiny_patch16_224", "all", [""]),
        ("vit_tiny_patch16_224", "head", ["head."]),
        ("vit_tiny_patch16_224", "last:2", ["blocks.10.", "blocks.11.", "norm.", "head."]),
        ("vit_tiny_patch16_224", ["blocks.3.mlp", "*.bias", "head"], ["blocks.3.mlp.", "head.", "bias"]),
        ("deit_tiny_distilled_patch16_224", "head", ["head.", "head_dist."]),
        ("convnext_atto", "head", ["head.fc."]),
        ("convnext_atto", "last:1", ["stages.3.blocks.1.", "head."]),
        ("test_resnet", "last:1", ["layer4.", "fc."]),
    ],
)
def test_only_what_is_named_is_trained(name: str, trainable: Any, trained: list[str]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    freeze(model, trainable)
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ends = tuple(one for one in trained if not one.endswith(".") and one)
    starts = tuple(one for one in trained if one not in ends)
    assert found == {n for n, _ in model.named_parameters() if n.startswith(starts) or (ends and n.endswith(ends))} and found


@pytest.mark.parametrize(
    ("model", "trainable", "words"),
    [
        (lambda: timm.create_model("pit_xs_224"), "last:1", ["last:1", "pit_xs_224", "list of names"]),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "head", ["get_classifier", "Sequential"]),
        (lambda: timm.create_model("test_resnet", num_classes=0), "head", ["nothing to train", "no classifier"]),
        (lambda: timm.create_model("test_resnet").requires_grad_(False), ["fc"], ["nothing to train", "frozen"]),
        (lambda: timm.create_model("test_resnet"), "last:99", ["last:99", "at most last:"]),
        (lambda: timm.create_model("test_resnet"), ["fc", "layer5.*"], ["'layer5.*'", "layer"]),
    ],
)
def test_what_cannot_be_trained_alone_is_refused(model: Any, trainable: Any, words: list[str]) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=r"^model\.trainable") as caught:
        freeze(model(), trainable)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (["blokcs.*"], ["optim.groups[0].match: 'blokcs.*'", "blocks.*"]),
        (["head", "blocks.*.attn.qvk"], ["optim.groups[1].match", "blocks.*.attn.qkv"]),
        (["head", "*"], ["optim.groups[0].match: 'head'", "behind"]),
        (["patch_embed.proj"], ["optim.groups[0].match", "frozen"]),
    ],
)
def test_a_rule_without_effect_is_refused(rules: list[str], words: list[str]) -> None:
    model = small_vit()
    model.patch_embed.requires_grad_(False)  # pyright: ignore
    with pytest.raises(UserError) as caught:
        settings(model, 0.1, None, [GroupConfig(pattern, 2.0) for pattern in rules])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def test_the_table_counts_each_parameter_once() -> None:
    model = small_vit()
    model.patch_embed.requires_grad_(False)  # pyright: ignore
    _, head, *rows = group_table(model, OptimConfig(layer_decay=0.5, groups=(GroupConfig("blocks.*", 2.0),)))
    assert head.split() == ["match", "rate", "x", "decay", "tensors", "parameters", "names"]
    assert [row.split()[:2] for row in rows] == [
        ["blocks.*", "0.25-1"], ["blocks.*", "0.25-1"], ["(the", "rest)"], ["(the", "rest)"], ["(frozen)", "2"],
    ]  # fmt: skip
    cells = [re.findall(r" (\d+) +([\d,]+)  [a-z]", row)[0] for row in rows]
    counts = [[int(cell.replace(",", "")) for cell in pair] for pair in cells]
    whole = list(model.parameters())
    assert [sum(column) for column in zip(*counts)] == [len(whole), sum(parameter.numel() for parameter in whole)]
    assert counts[-1] == [2, 16 * 16 * 3 * 24 + 24] and rows[-1].endswith("patch_embed.proj.weight, patch_embed.proj.bias")


def test_layer_decay_is_refused_without_layers() -> None:
    with torch.device("meta"):
        model = timm.create_model("pit_xs_224")
    with pytest.raises(UserError, match=r"optim\.layer_decay: 0\.75 .* pit_xs_224: set it to null"):
        parameter_groups(model, 0.1, 0.75)
    with pytest.raises(UserError, match="Linear"):
        parameter_groups(nn.Linear(2, 2), 0.1, 0.75)


@pytest.mark.parametrize("entry", SWEEP)
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


def test_schedules_are_their_formulas() -> None:
    """Each against its formula, or torch's scheduler, over 100 steps with a warm-up of ten."""

    def rates(**keys: Any) -> list[float]:
        return [learning_rate(OptimConfig(lr=2.0, warmup=10, **keys), step, 100) for step in range(100)]

    left = [1 - (step - 10) / 90 for step in range(10, 100)]
    for keys, expected in (
        ({"schedule": "cosine", "min_lr": 0.5}, [0.5 + 1.5 * (1 - math.cos(math.pi * one)) / 2 for one in left]),
        ({"schedule": "linear", "min_lr": 0.5}, [0.5 + 1.5 * one for one in left]),
        ({"schedule": "poly", "power": 2.0, "min_lr": 0.5}, [0.5 + 1.5 * one**2 for one in left]),
        ({"schedule": "wsd", "cooldown": 0.25, "min_lr": 0.5}, [2.0] * 65 + [2.0 - 1.5 * s / 25 for s in range(25)]),
        ({"schedule": "wsd", "cooldown": 500}, [2.0 * one for one in left]),
        ({"schedule": "step", "milestones": (0.3, 0.7)}, [2.0] * 20 + [0.2] * 40 + [0.02] * 30),
    ):  # fmt: skip
        found = rates(**keys)
        assert found[10:] == pytest.approx(expected, rel=1e-12), keys
        assert found[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)], rel=1e-12)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [7, 30, 81], gamma=0.5)
    config = OptimConfig(lr=2.0, warmup=0, schedule="step", milestones=(0.07, 0.3, 0.81), gamma=0.5)
    for step in range(100):
        assert learning_rate(config, step, 100) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        scheduler.step()


def test_the_peak_scales_with_the_batch() -> None:
    assert peak_rate(OptimConfig(lr=0.1), 4096) == 0.1
    assert peak_rate(OptimConfig(lr=0.1, lr_base_size=256), 1024) == pytest.approx(0.4)
    assert peak_rate(OptimConfig(lr=0.1, lr_base_size=256, lr_base_scale="sqrt"), 1024) == pytest.approx(0.2)


# Of two matrices and two biases: each, none, or each group.
COUNTERS = {"adamw": 4, "sgd": 0, "lion": 0, "lamb": 2, "adafactor": 4, "muon": 2}


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
        state_layout(OptimConfig(), (2, 3))


def test_a_name_without_a_branch_is_no_muon() -> None:
    with pytest.raises(ValueError, match="nadam has no branch"):
        state_layout(OptimConfig(name="nadam"), (2, 3))  # type: ignore[arg-type]
