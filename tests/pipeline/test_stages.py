"""A model in stages is the model, whatever its forward does with its values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from bigvision.errors import UserError
from bigvision.models import find_blocks
from bigvision.models.exact_init import given
from bigvision.models.tracing import node_costs
from bigvision.pipeline import StagePlan
from bigvision.pipeline.cutting import Flow
from bigvision.pipeline.stages import imbalance
from tests.models.zoo import ZOO, Entry
from tests.pipeline.staged import backward, compare, cut, run, total

QUICK = {"resnet"}
REFUSED = {"twins": "cannot be traced", "gemma4_vit": "cannot be traced", "vgg": "has 1 blocks: use fewer stages"}
"""Of timm's modules; docs/stages.md says why."""
INEXACT = {"cpubone"}
"""Whose output differs in its last bits."""


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, marks=[pytest.mark.long] * (entry.module not in QUICK))
        for entry in ZOO
        if entry.module not in REFUSED
    ],
    ids=lambda entry: entry.module,
)
def test_every_module_of_timm_in_stages(entry: Entry) -> None:
    """Two and four stages give exactly the whole model's output, and its gradients up to the order of sums."""
    for count in (2, 4):
        found = compare(entry, count)
        assert found.output < (1e-6 if entry.module in INEXACT else 1e-30), (count, found)
        assert found.gradients < 2e-6, (count, found)


@pytest.mark.parametrize("entry", [entry for entry in ZOO if entry.module in REFUSED], ids=lambda entry: entry.module)
def test_what_cannot_be_cut_says_why(entry: Entry) -> None:
    with pytest.raises(UserError, match=REFUSED[entry.module]):
        compare(entry, 2)


def large(name: str, stages: int = 4) -> tuple[nn.Module, StagePlan, Any]:
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = find_blocks(model)
    size: Any = resolve_model_data_config(model)["input_size"]
    return model, cut(model, blocks, size, stages), blocks


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit_giant_patch14_224", "convnext_xxlarge", "swin_large_patch4_window7_224"])
def test_large_models_are_cut_evenly(name: str) -> None:
    model, plan, blocks = large(name)
    assert imbalance(plan.costs) <= 1.05
    assert imbalance(plan.costs) <= equal_counts(model, blocks)
    assert sum(cost.parameters for cost in plan.costs) == sum(p.numel() for p in model.parameters())


def equal_counts(model: nn.Module, blocks: Any, stages: int = 4) -> float:
    """The imbalance of a cut into stages of equally many blocks."""
    size: Any = resolve_model_data_config(model)["input_size"]
    flow = Flow(blocks.graph, size, torch.device("cpu"))
    costs = node_costs(blocks.graph, size, torch.device("cpu"))
    starts = {blocks[round(number * len(blocks) / stages)].path for number in range(1, stages)}
    work, number = [0.0] * stages, 0
    for node in flow.nodes:
        number += node.op == "call_module" and str(node.target) in starts
        work[number] += costs[node.name].work
    return max(work) * stages / sum(work)


def test_flops_are_those_of_the_literature() -> None:
    """ViT-B/16 at 224 pixels: 17.6 GMACs (Dosovitskiy et al. 2021), two FLOPs each."""
    _, plan, _ = large("vit_base_patch16_224", 2)
    assert sum(cost.flops for cost in plan.costs) == pytest.approx(2 * 17.56e9, rel=0.01)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Model(nn.Module):
    """Four blocks on the pixels' columns; *middle* is what happens between them."""

    def __init__(
        self, middle: Callable[[Model, Tensor, int], Tensor], after: Callable[[Model, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.scale = nn.Parameter(torch.full((8,), 1.1))
        self.register_buffer("table", torch.linspace(-1.0, 1.0, 8))
        self.factor, self.factors = torch.full((8,), 0.9), {"of": (torch.full((8,), 0.9),)}
        self.middle, self.after = middle, after

    def forward(self, images: Tensor) -> Tensor:
        x = images[:, 0]
        for number, block in enumerate(self.blocks):
            x = block(self.middle(self, x, number))
        return self.after(self, images, x)


def plain(model: Model, x: Tensor, number: int) -> Tensor:
    return x


def last(model: Model, images: Tensor, x: Tensor) -> Tensor:
    return x.mean(1)


def reshaped(model: Model, x: Tensor, number: int) -> Tensor:
    """Sizes of an earlier tensor, used much later."""
    if number == 0:
        model.sizes = x.shape  # type: ignore[assignment]
    if number == 3:
        count, rows, columns = model.sizes  # type: ignore[misc]
        return (x.reshape(count * rows, columns) * 2).view(count, rows, columns)
    return x


def tabled(model: Model, x: Tensor, number: int) -> Tensor:
    """A buffer that every stage reads, and what is computed from it."""
    return x + torch.sin(model.table * 3)  # type: ignore[operator]


def scaled(model: Model, x: Tensor, number: int) -> Tensor:
    """A parameter that every stage reads."""
    return x * model.scale


def in_place(model: Model, x: Tensor, number: int) -> Tensor:
    """What has just been received is changed."""
    return x.mul_(1.5) if number else x


def attributed(model: Model, x: Tensor, number: int) -> Tensor:
    """A tensor that is neither parameter nor buffer, which some stages read and others lack."""
    return x * model.factor if number > 1 else x


def with_images(model: Model, images: Tensor, x: Tensor) -> Tensor:
    """The images themselves are needed at the end: they skip over all stages, and need no gradient."""
    return x.mean(1) + images.mean((1, 2))


CASES = {
    "plain": (plain, last), "sizes": (reshaped, last), "buffers": (tabled, last), "parameters": (scaled, last),
    "attributes": (attributed, last), "in place": (in_place, last), "skip": (plain, with_images),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("samples", [3, 5])
def test_what_a_forward_may_do_with_its_values(case: str, samples: int) -> None:
    """The cut is made with other numbers of images than are run."""
    torch.manual_seed(0)
    model = Model(*CASES[case])
    images = torch.randn(samples, 3, 6, 8)
    total(model(images)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    meta, _ = given(model)
    plan = cut(meta, find_blocks(meta, 8, 0.3), (3, 6, 8), 4)
    assert plan.owners["scale"] == [0] and len(plan.blocks) == 4
    stages = [plan.build(model, number) for number in range(4)]
    inputs, outputs = run(stages, images)
    assert torch.equal(outputs[-1], model(images))
    backward(inputs, outputs, total(outputs[-1]))
    assert all(torch.allclose(dict(model.named_parameters())[name].grad, grad, rtol=1e-5) for name, grad in expected.items())  # type: ignore[arg-type]
    for spec, received in zip(plan.sends[True, (6, 8)][0], inputs[1]):
        assert spec.sizes(samples) == received.shape and spec.requires_grad == received.requires_grad


def tied_model(first: int, second: int) -> Model:
    model = Model(plain, last)
    model = model.to("meta")  # which would part them
    model.blocks[second].second.weight = model.blocks[first].first.weight  # type: ignore[union-attr]
    return model


def test_tied_parameters_stay_on_one_stage() -> None:
    model = tied_model(1, 2)
    plan = cut(model, find_blocks(model, 8, 0.6), (3, 6, 8), 2)
    assert plan.owners["blocks.1.first.weight"] == plan.owners["blocks.2.second.weight"]
    assert len(plan.owners["blocks.1.first.weight"]) == 1


def test_parameters_tied_across_every_cut_are_refused_by_name() -> None:
    model = tied_model(0, 3)
    with pytest.raises(UserError, match=r"parallel.stages.*blocks.0.first.weight is shared"):
        cut(model, find_blocks(model, 8, 0.6), (3, 6, 8), 2)


def test_modules_are_in_the_order_of_their_calls() -> None:
    """The same on every rank: FSDP gathers in this order, and each process has its own order of the strings of a set."""
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224")
    plan = cut(model, find_blocks(model), (3, 224, 224), 2)
    for number in range(2):
        calls = [str(node.target) for node in plan.graphs[True, (224, 224)][number].nodes if node.op == "call_module"]
        stage = plan.build(model, number)
        held = [path for path, _ in stage.named_modules() if path in calls]
        assert len(held) > 5
        for depth in (0, 1):  # a block's own children come with it
            assert [path for path in held if path.count(".") == depth] == [path for path in calls if path.count(".") == depth]


def test_a_stage_takes_values_for_its_own_attributes_alone() -> None:
    model, values = given(Model(attributed, last))
    plan = cut(model, find_blocks(model, 8, 0.3), (3, 6, 8), 4)
    stages = [plan.build(model, number) for number in range(4)]
    for stage in stages:
        values.set_attributes(stage, "cpu")
    assert [hasattr(stage, "factor") for stage in stages] == [False, True, True, False]
    assert all(torch.equal(stage.factor, torch.full((8,), 0.9)) for stage in stages[1:3])  # type: ignore[arg-type]


@pytest.mark.parametrize("made", [lambda model: model.factors["of"][0], lambda model: torch.ones(8)])
def test_a_tensor_without_a_name_is_refused_by_a_pipeline_alone(made: Callable[[Model], Tensor]) -> None:
    model = Model(lambda model, x, number: x * made(model), last).to("meta")
    blocks = find_blocks(model, 8, 0.3)
    assert len(blocks) == 4 and blocks.graph is None
    with pytest.raises(UserError, match=r"pipeline cannot cut Model: .*a tensor that has no name: register it as a buffer"):
        cut(model, blocks, (3, 6, 8), 4)


def test_more_stages_than_blocks() -> None:
    model = Model(plain, last).to("meta")
    with pytest.raises(UserError, match="5 stages, but Model has 4 blocks"):
        cut(model, find_blocks(model, 8, 0.3), (3, 6, 8), 5)


def test_a_stage_holds_only_its_own_and_computes_nothing_at_the_cut() -> None:
    model, plan, _ = large("vit_base_patch16_224")
    assert all(parameter.is_meta for parameter in model.parameters())
    stage = plan.build(model, 1)
    assert {name for name, _ in stage.named_parameters()} == {n for n, at in plan.owners.items() if at == [1]}
    assert all(name.startswith("blocks.") for name, _ in stage.named_parameters())
