"""Equal calls of modules: one runs, and what is counted is the same as if all did."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bigvision.models.alike import EqualCalls, equal_run_once
from bigvision.models.blocks import trace
from bigvision.models.formats import why_not
from bigvision.models.tracing import node_costs
from bigvision.pipeline.cutting import Flow

SHAPE = (3, 64, 64)


def shapes(values: dict) -> dict:
    return tree_map(lambda one: (one.shape, one.stride(), one.requires_grad) if isinstance(one, Tensor) else one, values)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 6, "drop_path_rate": 0.1}),
        ("resnet26", {}),
        pytest.param("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (2, 2, 6, 2)}, marks=pytest.mark.long),
    ],
)
def test_costs_are_those_of_all_calls(name: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        graph = trace(timm.create_model(name, num_classes=5, **options).train())
    blocks = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    products = [("attention", ()), ("addmm", (64, 256)), ("convolution", (64, 64, 3, 3))]
    found, calls = [], []
    plain = EqualCalls.key

    def counted(self: EqualCalls, *call: object) -> object:
        calls.append(plain(self, *call))  # type: ignore[arg-type]
        return calls[-1] if len(found) == 0 else None

    monkeypatch.setattr(EqualCalls, "key", counted)
    for _ in range(2):
        kept = (None, dict.fromkeys(blocks, ()), dict.fromkeys(blocks, products))
        costs = [node_costs(graph, SHAPE, torch.device("cuda"), torch.bfloat16, again) for again in kept]
        found.append((costs, shapes(Flow(graph, SHAPE, torch.device("cpu")).values)))
    assert found[0] == found[1]
    assert len(calls) > 2 * len(set(calls)), "few calls were found to be equal"


def test_calls_differ_where_modules_or_inputs_do() -> None:
    calls, one = EqualCalls(), torch.empty(2, 4, device="meta")
    first, equal, other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
    key = calls.key(first, [one], {})
    assert key == calls.key(equal, [torch.empty_like(one)], {})
    frozen, active = nn.Linear(4, 4).requires_grad_(False), nn.GELU("tanh")
    assert len({key, *(calls.key(module, [one], {}) for module in (other, frozen, active, nn.GELU()))}) == 5
    assert key not in {calls.key(first, [one.bfloat16()], {}), calls.key(first, [one.t()], {}), calls.key(first, [one[:1]], {})}
    assert calls.key(first, [object()], {}) is None
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    assert calls.key(hooked, [one], {}) != key


def test_equal_blocks_run_once_and_a_different_one_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=6, drop_path_rate=0.1, num_classes=5)
    model.blocks[5].mlp.fc1.bias = None
    ran, attention = list[nn.Module](), type(model.blocks[0].attn)
    forward = attention.forward

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        ran.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(attention, "forward", counted)
    with equal_run_once(list(model.blocks)):
        outputs = model(torch.empty(2, *SHAPE, device="meta"))
    # The first block's drop path has rate 0, the last has no bias; the other four are one.
    assert outputs.shape == (2, 5) and len(ran) == 3
    assert not any("forward" in vars(block) for block in model.blocks)
    model.blocks[4].mlp.act = Mixing()
    assert "bfloat16" in str(why_not(model, list(model.blocks), SHAPE, torch.bfloat16))


class Mixing(nn.Module):
    """Multiplies what it is given with a table in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.eye(x.shape[-1], device=x.device)
