"""What stages keep in memory: the estimate beside the tensors that autograd saves in real steps of real schedules."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bigvision.config import OptimConfig
from bigvision.errors import UserError
from bigvision.models import find_blocks, trace
from bigvision.models.tracing import Cost, node_costs
from bigvision.models.tracing import size as size_of
from bigvision.optim import state_bytes
from bigvision.pipeline import Placement, StageMemory, plan_stages
from bigvision.pipeline.schedules import micro_batches_kept
from tests.distributed import run_ranks
from tests.engine.test_pipeline import pipeline
from tests.pipeline.staged import cut, unlimited
from tests.recipes import run


class Packed:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Meter:
    """Counts the bytes of the storages that autograd holds on to, parameters' left out."""

    def __init__(self) -> None:
        self.holders: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        self.holders[key] = self.holders.get(key, 0) + 1
        self.sizes[key] = storage.nbytes()
        self.most = max(self.most, sum(self.sizes.values()))
        packed = Packed(tensor.detach())  # what holds on to the graph would keep it in a circle
        weakref.finalize(packed, self.release, key)
        return packed

    def release(self, key: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key], self.sizes[key]

    def hooks(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self.pack, lambda packed: packed.tensor if isinstance(packed, Packed) else packed)


def saved_in_a_run(plain: dict[str, Any]) -> tuple[int, float]:
    """Train; the most bytes that this rank's stages had saved for backward passes, and the estimate."""
    from bigvision.pipeline import Stage, StagePlan

    meter, built = Meter(), []
    forward, build = Stage.forward, StagePlan.build

    def metered(self: Stage, *received: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *received)
        with meter.hooks():
            # The images are a part of the batch's storage.
            return forward(self, *(tensor if tensor.requires_grad else tensor.clone() for tensor in received))

    def remembered(self: StagePlan, model: nn.Module, number: int) -> Stage:
        built.append((self, number))
        return build(self, model, number)

    Stage.forward, StagePlan.build = metered, remembered  # type: ignore[method-assign]
    try:
        run(plain)
    finally:
        Stage.forward, StagePlan.build = forward, build  # type: ignore[method-assign]
    estimates = [plan.memory.micro_batch * plan.memory.kept[i] * plan.costs[i].activations for plan, i in built]
    return meter.most, sum(estimates)


@pytest.mark.parametrize(
    ("ranks", "parallel", "micro_batch"),
    [
        pytest.param(2, {"schedule": "zbv"}, 3, marks=pytest.mark.long),
        pytest.param(4, {"schedule": "1f1b"}, 12, marks=pytest.mark.long),  # fewer micro-batches than stages
        (2, {"schedule": "interleaved", "recompute": "blocks"}, 3),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                (2, {"schedule": "gpipe"}, 3),
                (2, {"schedule": "interleaved"}, 3),
                (2, {"schedule": "dualpipev"}, 3),
                (4, {"schedule": "1f1b"}, 3),
                (4, {"schedule": "1f1b", "stages": 2}, 3),  # sharded
                (4, {"schedule": "1f1b", "recompute": "blocks"}, 3),
                (4, {"schedule": "interleaved"}, 3),
                (4, {"schedule": "zbv"}, 3),
                (4, {"schedule": "zbv"}, 12),
            ]
        ),
    ],
)
def test_activations_are_those_that_a_run_keeps(tmp_path: Path, ranks: int, parallel: dict[str, Any], micro_batch: int) -> None:
    made = pipeline(tmp_path, parallel=parallel, train={"steps": 2, "micro_batch": micro_batch})
    made["model"] = made["model"] | {"options": made["model"]["options"] | {"depth": 8}}
    for rank, (saved, estimate) in enumerate(run_ranks(saved_in_a_run, ranks, made)):
        # Where several stages of a rank are unequal, as with recompute, they may keep the most a moment sooner or later.
        least = 0.9 if "recompute" in parallel else 0.97
        assert least < estimate / saved < 1.02, (rank, saved, estimate)


def test_a_stage_keeps_nothing_of_its_last_pass() -> None:
    options: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 4}
    with torch.device("meta"):
        meta = timm.create_model("vit_tiny_patch16_224", **options)
    plan = cut(meta, find_blocks(meta, 32), (3, 32, 32), 2)
    stage = plan.build(timm.create_model("vit_tiny_patch16_224", **options), 0)
    meter = Meter()
    with meter.hooks():
        sent = stage(torch.randn(2, 3, 32, 32))
    assert meter.sizes and sent
    del sent
    assert not meter.sizes, "its activations would stay until the next pass"


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_activations_in_the_compute_type(name: str) -> None:
    """Beside what a model all in bf16 saves."""
    images = torch.randn(2, 3, 96, 96, dtype=torch.bfloat16)
    options = {"img_size": 96} if name.startswith("vit") else {}
    model = timm.create_model(name, **options).bfloat16()
    meter = Meter()
    with meter.hooks():
        output = model(images)
    assert output.requires_grad
    meta = copy.deepcopy(model).float().to("meta")
    costs = node_costs(trace(meta), (3, 96, 96), torch.device("cpu"), torch.bfloat16)
    assert 2 * sum(cost.activations for cost in costs.values()) == pytest.approx(meter.most, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 8), ({"name": "sgd"}, 4), ({"name": "sgd", "momentum": 0.0}, 0), ({"name": "lion"}, 4), ({"name": "muon"}, 4),
        ({"name": "adafactor"}, 4 + 8 / 1024),
    ],
)  # fmt: skip
def test_moments_are_those_of_the_optimizer(changes: dict[str, Any], expected: int) -> None:
    assert state_bytes(replace(OptimConfig(), **changes)) == expected


def test_micro_batches_kept() -> None:
    """By hand from the schedules' papers; with fewer micro-batches than stages nothing is freed before all are through."""
    one, two = Placement(4, 1, False), Placement(4, 2, True)
    assert micro_batches_kept("gpipe", one, 9) == (9,) * 4
    assert micro_batches_kept("1f1b", one, 9) == (4, 3, 2, 1)
    assert micro_batches_kept("1f1b", one, 3) == (3, 3, 3, 3)
    assert micro_batches_kept("zbv", two, 9)[:4] == (7, 6, 5, 4)
    assert micro_batches_kept("interleaved", Placement(4, 2, False), 16) == (7, 5, 4, 4, 4, 4, 3, 1)


MIB = 2**20
LOAD = Cost(parameters=MIB, trained=MIB // 2, activations=100.0, recomputed=30.0, received=5.0, sent=7.0)


def memory(capacity: float | None = None, **changes: Any) -> StageMemory:
    return replace(unlimited(2), capacity=capacity, **changes)


def test_what_a_stage_needs() -> None:
    passes = 3 * (2 * 100 + 30 + 6 * (5 + 7) + 2 * 7)
    assert memory().needed(0, LOAD) == 4 * MIB + 12 * MIB // 2 + passes
    # Each micro-batch keeps the weights that it multiplied, and with recompute only the last.
    half = memory(compute=torch.bfloat16)
    assert half.needed(0, LOAD) == memory().needed(0, LOAD) + 2 * 2 * MIB
    assert replace(half, recompute="blocks").needed(0, LOAD) == memory().needed(0, LOAD) + 2 * MIB
    # A sharded stage has its weights and gradients whole during a step.
    assert replace(half, shards=4).needed(0, LOAD) == (4 * MIB + 12 * MIB // 2) / 4 + 2 * MIB + 4 * MIB // 2 + passes


def test_stages_of_one_rank_share_its_device() -> None:
    made = memory(1e9, placement=Placement(2, 2, True), kept=[3, 2, 1, 1])
    limits = made.limits(LOAD)
    assert limits[0] + limits[3] == pytest.approx(1e9) == limits[1] + limits[2]
    assert limits[0] / limits[3] == pytest.approx(made.needed(0, LOAD) / made.needed(3, LOAD))


def test_what_does_not_fit_a_device_is_cut_elsewhere() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=8)
    arguments = model, find_blocks(model, 64), (3, 64, 64), torch.device("cpu")
    free = memory(micro_batch=60)
    even = plan_stages(*arguments, free)
    needs = [free.needed(stage, even.costs[stage]) for stage in (0, 1)]
    assert needs[0] > 1.4 * needs[1], "the first stage keeps two micro-batches, the second one"
    limit = 0.9 * needs[0]
    uneven = plan_stages(*arguments, replace(free, capacity=limit))
    assert uneven.costs[0].parameters < even.costs[0].parameters
    assert sum(uneven.costs, Cost()).parameters == size_of(model) == sum(even.costs, Cost()).parameters
    assert max(free.needed(stage, uneven.costs[stage]) for stage in (0, 1)) <= limit
    with pytest.raises(UserError, match=r"fits the devices' memory .*stage 0 needs 2\.\d+ times"):
        plan_stages(*arguments, replace(free, capacity=needs[0] / 2.2))
