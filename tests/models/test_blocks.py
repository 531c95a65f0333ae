"""Blocks: found in every timm model, disjoint, in order, called once; the model is left as it was."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import is_notrace_module
from torch import fx, nn

from bigvision.models import find_blocks, trace
from bigvision.models.tracing import TraceFailed, has_parts, openable, size
from tests.models.zoo import SWEEP

NOT_TRACED = {"gemma4_vit", "twins"}
"""Modules of timm whose forward cannot be traced."""


def on_meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **options)


def describe(module: nn.Module):
    """Everything that finding blocks must not change."""
    parts = module.named_modules()
    return [(path, type(part), part.training, sorted(vars(part)), part.forward.__func__) for path, part in parts]


@pytest.mark.parametrize("entry", SWEEP)
def test_every_module_of_timm_has_blocks(entry):
    module = on_meta(entry.name, **entry.options)
    before = describe(module)
    blocks = find_blocks(module, module.pretrained_cfg["input_size"][-1])
    assert describe(module) == before
    assert (blocks.graph is not None) == (entry.module not in NOT_TRACED), blocks.reason
    assert (blocks.reason is None) == (blocks.graph is not None)
    assert len(blocks) > 1 or entry.module == "vgg"  # mostly one module that timm lets no trace into

    paths = [block.path for block in blocks]
    assert not [(a, b) for a in paths for b in paths if a != b and b.startswith(f"{a}.")], "no block inside another"
    parameters = [id(parameter) for block in blocks for parameter in block.module.parameters()]
    assert len(parameters) == len(set(parameters)), "no parameter in two blocks"
    modules = [id(part) for block in blocks for part in block.module.modules()]
    assert len(modules) == len(set(modules)), "no module in two blocks"

    for block in blocks:
        assert block.module is module.get_submodule(block.path)
        assert block.parameters == size(block.module) > 0
        if blocks.graph and block.parameters > 0.25 * size(module) and not is_notrace_module(type(block.module)):
            assert not has_parts(block.module), f"{block.path} is too large and could be opened"
    if blocks.graph is not None:
        called = [str(node.target) for node in blocks.graph.graph.nodes if node.op == "call_module"]
        assert [path for path in called if path in set(paths)] == paths, "called once each, in this order"
        assert not any(isinstance(value, fx.Proxy) for part in module.modules() for value in vars(part).values())


@pytest.mark.parametrize(
    "name, first, last, count",
    [
        ("vit_base_patch16_224", "blocks.0", "blocks.11", 12),
        ("convnext_tiny", "stages.0.blocks.0", "stages.3.blocks.2", 18),
        ("resnet50", "layer1.0", "layer4.2", 16),
        ("eva02_base_patch14_224", "blocks.0", "blocks.11", 12),
        ("swin_base_patch4_window7_224", "layers.0.blocks.0", "layers.3.blocks.1", 24),
    ],
)
def test_blocks_are_what_the_field_calls_blocks(name, first, last, count):
    blocks = find_blocks(on_meta(name))
    assert (blocks[0].path, blocks[-1].path, len(blocks)) == (first, last, count)


def test_a_large_head_is_a_block_and_a_usual_one_is_not():
    assert find_blocks(on_meta("vit_tiny_patch16_224", num_classes=10))[-1].path == "blocks.11"
    assert find_blocks(on_meta("vit_tiny_patch16_224", num_classes=21841))[-1].path == "head"


def test_a_block_that_is_too_large_is_opened():
    module = on_meta("vit_tiny_patch16_224", depth=2, num_classes=10)
    paths = [block.path for block in find_blocks(module, 224, max_share=0.3)]
    assert paths == ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]
    assert [block.path for block in find_blocks(module, 224, max_share=0.6)] == ["blocks.0", "blocks.1"]


class Shared(nn.Module):
    """Calls one layer twice and reads a weight of another without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(6))
        self.blocks[1][1].weight = self.blocks[2][0].weight  # tied: neither may be sharded apart

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.blocks[0](x) @ self.blocks[5][0].weight


def test_what_is_used_elsewhere_too_is_in_no_block():
    paths = {block.path for block in find_blocks(Shared())}
    assert {"blocks.3", "blocks.4"} <= paths
    assert not paths & {"blocks.0", "blocks.1", "blocks.2", "blocks.5", "blocks.1.1", "blocks.2.0", "blocks.5.0"}


def test_a_trace_computes_what_the_model_computes():
    module = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4).eval()
    graph, images = trace(module), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(graph(images), module(images))
    assert graph.get_submodule("blocks.0") is module.blocks[0]


class Branching(nn.Module):
    """A forward that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_is_said():
    with pytest.raises(TraceFailed, match="forward of Branching"):
        trace(Branching())


def test_an_untraceable_part_stays_closed_when_it_is_small():
    module = nn.Sequential(nn.Sequential(Branching()), nn.Linear(64, 64))
    assert "0.0" in openable(module, 0.0)
    assert {str(node.target) for node in trace(module, 0.001 + 40 / size(module)).graph.nodes} >= {"1"}
