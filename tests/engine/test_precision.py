"""Formats, loss scaling and compiled blocks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from bigvision.config import Config, ModelConfig, load_config
from bigvision.data import Batch
from bigvision.engine import Engine
from bigvision.engine.parallelize import Computing, choose_computing
from bigvision.engine.state import allocate
from bigvision.engine.step import LossScale
from bigvision.errors import UserError
from bigvision.models import Blueprint, blueprint, find_blocks
from bigvision.models.formats import CAST_BUFFERS, OneType, why_not
from bigvision.runtime import Runtime, start
from bigvision.training.build import build_model
from tests.distributed import run_ranks
from tests.models.zoo import ZOO, Entry
from tests.recipes import recipe, run

CPU, BF16 = torch.device("cpu"), torch.bfloat16


@pytest.mark.parametrize(
    "model", ["vit", *(pytest.param(name, marks=pytest.mark.long) for name in ("resnet", "swin", "eva02"))]
)
def test_bf16_is_near_fp32_and_keeps_fp32_masters(tmp_path: Path, model: str) -> None:
    short = {"steps": 5, "micro_batch": 6}
    reference = run_ranks(run, 1, recipe(tmp_path / "fp32", model, train=short))[0]
    for strategy in ("ddp", "fsdp"):
        out = tmp_path / strategy
        plain = recipe(out, model, train=short, parallel={"strategy": strategy, "precision": "bf16"})
        losses = run_ranks(run, 2, plain)[0]
        assert losses == pytest.approx(reference, rel=3e-2) and losses != reference
        saved = load_file(out / "step-00000005" / "model.safetensors")
        assert all(t.dtype == torch.float32 for t in saved.values() if t.is_floating_point())
        weight = next(t for t in saved.values() if t.ndim > 1 and t.is_floating_point())
        assert not torch.equal(weight, weight.bfloat16().float()), "the masters were rounded"


def engine_on_rank(plain: dict[str, Any], runtime: Runtime) -> tuple[Engine, Config]:
    config = load_config(plain)
    engine, _, _ = build_model(config, 10, runtime, steps=100, say=lambda text: None)
    return engine, config


def random_batch(runtime: Runtime, size: int = 4) -> Batch:
    draw = torch.Generator().manual_seed(runtime.rank)
    images = torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 10, (size,), generator=draw)
    return Batch(images, labels, labels, torch.ones(size, dtype=torch.bool))


def overflow(plain: dict[str, Any]) -> None:
    with start("cpu") as runtime:
        engine, _ = engine_on_rank(plain, runtime)
        assert isinstance(engine, Engine)
        batch = random_batch(runtime)
        engine.stepper.scale.scale.fill_(2.0**8)
        assert not engine.train_step(batch).skipped
        before = [fragment.values.clone() for fragment in engine.fragments()]
        steps, scale = engine.scalars()["optimizer_steps"], 2.0**60
        engine.stepper.scale.scale.fill_(scale)
        result = engine.train_step(batch)
        assert result.skipped and not torch.isfinite(result.grad_norm)
        assert all(torch.equal(a, f.values) for a, f in zip(before, engine.fragments()))
        assert engine.scalars() | {"good_steps": 0} == {
            "step": 2, "skipped": 1, "samples": 2 * 4 * runtime.world_size, "optimizer_steps": steps,
            "loss_scale": scale / 2, "good_steps": 0,
        }  # fmt: skip
        engine.stepper.scale.scale.fill_(2.0**8)
        result = engine.train_step(batch)
        assert not result.skipped and torch.isfinite(result.loss)
        assert not all(torch.equal(a, f.values) for a, f in zip(before, engine.fragments()))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_fp16_skips_a_step_that_overflows(tmp_path: Path, strategy: str) -> None:
    plain = recipe(tmp_path, parallel={"strategy": strategy, "precision": "fp16"}, train={"global_batch": 8})
    run_ranks(overflow, 2, plain)


def test_fp16_clips_the_unscaled_gradient(tmp_path: Path) -> None:
    short: dict[str, Any] = {"train": {"steps": 5}, "optim": {"clip": 0.05, "name": "sgd", "lr": 0.5}}
    reference = run_ranks(run, 1, recipe(tmp_path / "fp32", **short))[0]
    half = run_ranks(run, 1, recipe(tmp_path / "fp16", **short, parallel={"precision": "fp16"}))[0]
    assert half == pytest.approx(reference, rel=1e-3)


def test_loss_scale_grows_and_shrinks() -> None:
    scale, yes, no = LossScale("fp16", torch.device("cpu")), torch.tensor(True), torch.tensor(False)
    for _ in range(LossScale.growth_interval):
        assert not scale.update(no, yes)
    assert scale.state() == {"loss_scale": 2.0**17, "good_steps": 0}
    scale.update(no, yes)
    assert scale.update(yes, yes)
    assert scale.state() == {"loss_scale": 2.0**16, "good_steps": 0}
    scale.update(no, yes)
    assert not scale.update(yes, no), "a loss that is not finite is no overflow"
    assert scale.state() == {"loss_scale": 2.0**16, "good_steps": 1}
    scale.scale.fill_(1.0)
    assert not scale.update(yes, yes), "at the least scale it is no overflow to be expected"
    assert scale.state()["loss_scale"] == 1.0
    fixed = LossScale("bf16", torch.device("cpu"))
    assert not fixed.update(yes, yes) and fixed.factor == 1.0


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_compiled_blocks_change_nothing(tmp_path: Path, strategy: str) -> None:
    short = {"steps": 4, "micro_batch": None}
    reference = run_ranks(run, 1, recipe(tmp_path / "plain", train=short))[0]
    plain = recipe(tmp_path / strategy, train=short, parallel={"strategy": strategy, "compile": True, "recompute": "blocks"})
    assert run_ranks(run, 2, plain)[0] == pytest.approx(reference, rel=1e-5)


# Gradients that travel in bf16.


REDUCED = [
    ("fsdp", 2, {}), *(
        pytest.param(strategy, ranks, more, marks=pytest.mark.long)
        for strategy, ranks, more in (
            ("ddp", 2, {}), ("fsdp", 4, {"replicas": 2}), ("zero1", 2, {}), ("zero2", 3, {}), ("zero3", 2, {}),
            ("pipeline", 4, {"stages": 2}), ("pipeline", 4, {"stages": 2, "replicas": 2}),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("strategy", "ranks", "more"), REDUCED)
def test_gradients_reduced_in_bf16_are_rounded_once(tmp_path: Path, strategy: str, ranks: int, more: dict[str, Any]) -> None:
    """SGD without momentum moves each weight by its gradient, which bf16 rounds by at most 1/512 in each sum."""
    optim = {"name": "sgd", "momentum": 0.0, "lr": 1.0, "warmup": 0, "clip": None, "weight_decay": 0.0, "schedule": "constant"}
    one: dict[str, Any] = {"train": {"steps": 1, "micro_batch": 3}, "optim": optim}
    found = []
    for reduce in ("fp32", "bf16"):
        plain = recipe(tmp_path / reduce, parallel={"strategy": strategy, "reduce": reduce, **more}, **one)
        run_ranks(run, ranks, plain)
        found.append(load_file(tmp_path / reduce / "step-00000001" / "model.safetensors"))
    run_ranks(run, 1, recipe(tmp_path / "start", train=one["train"], optim=optim | {"lr": 1e-30}))
    before = load_file(tmp_path / "start" / "step-00000001" / "model.safetensors")
    exact, rounded = (torch.cat([(tensors[name] - before[name]).flatten() for name in before]) for tensors in found)
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < error < ranks * 2**-9, f"{error:.1e}"


# How far from fp32.


def gradient(module: nn.Module, images: Tensor, labels: Tensor, computing: Computing, blocks: list[nn.Module]) -> Tensor:
    """The gradient of all parameters, as one tensor, where *module* computes as *computing* says."""
    computing.apply([module], blocks, cast_weights=True, device=CPU)
    F.cross_entropy(module(images).float(), labels).backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert all(one.dtype == torch.float32 for one in gradients)
    return torch.cat([one.flatten() for one in gradients])


@pytest.mark.parametrize("seed", [1, pytest.param(0, marks=pytest.mark.long)])
def test_gradients_in_bf16_are_nearly_as_good_as_those_of_autocast(seed: int) -> None:
    """Over 24 blocks. Residual sums in bf16 would be too far off, which this test must be able to see."""
    torch.manual_seed(seed)
    module = timm.create_model(
        "vit_tiny_patch16_224", depth=24, embed_dim=96, num_heads=3, img_size=64, patch_size=8, num_classes=10
    )  # fmt: skip
    images, labels = torch.randn(16, 3, 64, 64), torch.randint(0, 10, (16,))

    def of(computing: Computing) -> Tensor:
        twin = copy.deepcopy(module)
        return gradient(twin, images, labels, computing, list(twin.get_submodule("blocks").children()))

    exact = of(Computing(torch.float32))
    kinds = Computing(BF16, autocast=True), Computing(BF16), Computing(BF16, residual=False)
    autocast, ours, rounded = (float((of(kind) - exact).norm() / exact.norm()) for kind in kinds)
    assert autocast > 1e-3 and ours <= 1.5 * autocast < rounded


# Which models need autocast, and which buffers are cast.


def smallest(entry: Entry) -> Blueprint:
    """*entry* for images that are as small as the model takes them."""
    for size in (64, 96, 128):
        try:
            return blueprint(ModelConfig(entry.name, image_size=size, options=entry.options), 10)
        except UserError:
            continue
    return blueprint(ModelConfig(entry.name, options=entry.options), 10)


@pytest.mark.long
@pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.module)
def test_every_timm_module_trains_in_bf16_without_autocast(entry: Entry) -> None:
    plan = smallest(entry)
    module = plan.module
    blocks = find_blocks(module, plan.image_size)
    config = load_config({"model": {"name": entry.name}, "parallel": {"precision": "bf16", "device": "cpu"}})
    computing = choose_computing(config, plan, blocks, CPU, False, 2)
    assert not computing.autocast and computing.note is None
    for name, parameter in module.named_parameters():
        assert not parameter.is_floating_point() or parameter.dtype == torch.float32, name
    computing.apply([module], [block.module for block in blocks], cast_weights=True, device=CPU)
    allocate(module, CPU)
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, value in plan.tensors(0):
            tensors[name].copy_(value)
    plan.fill_attributes(module, CPU)
    module.train()
    draw = torch.Generator().manual_seed(0)
    outputs = module(torch.randn(2, *plan.input_shape, generator=draw))
    loss = F.cross_entropy(outputs.float(), torch.tensor([1, 7]))
    loss.backward()
    assert outputs.dtype == BF16 and torch.isfinite(loss)
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    for name, value in gradients.items():
        assert value.dtype == torch.float32 and torch.isfinite(value).all(), name
    assert any(value.any() for value in gradients.values())


CASTING = {
    "beit": {"k_bias"}, "eva": {"k_bias"}, "swin_transformer": {"attn_mask"}, "swin_transformer_v2": {"k_bias", "attn_mask"},
    "swin_transformer_v2_cr": {"attn_mask"}, "tresnet": {"filt"},
}  # fmt: skip
"""The modules of timm that have buffers which are read in the compute type."""


@pytest.mark.long
def test_which_buffers_are_cast() -> None:
    found: dict[str, set[str]] = {}
    for entry in ZOO:
        module = blueprint(ModelConfig(entry.name, options=entry.options), 10).module
        if names := {name.rpartition(".")[2] for name, _ in module.named_buffers()} & set(CAST_BUFFERS):
            found[entry.module] = names
    assert found == CASTING


# What is multiplied has one type.


def test_an_attention_mask_of_another_type_is_seen() -> None:
    """CUDA refuses one, the CPU does not."""
    query = torch.zeros(1, 2, 4, 8, dtype=BF16)
    mask = torch.zeros(4, 4)
    with OneType():
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask.bfloat16())
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask.bool())
        with pytest.raises(RuntimeError, match=r"scaled_dot_product_attention of .*bfloat16 and .*float32"):
            F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
            F.scaled_dot_product_attention(query, query, query, mask)


class Attention(nn.Module):
    """Attends with a mask that no list of ours names."""

    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 24)
        self.register_buffer("bias", torch.zeros(4, 4))

    def forward(self, images: Tensor) -> Tensor:
        query, key, value = self.inner(images.flatten(1).view(-1, 1, 4, 8)).chunk(3, -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)


def test_a_model_with_a_mask_of_another_type_is_not_computed_in_bf16() -> None:
    module = Attention().to("meta")
    reason = why_not(module, (), (2, 4, 4), BF16)
    assert reason is not None and reason.startswith("scaled_dot_product_attention of")
    assert why_not(module, (), (2, 4, 4), torch.float32) is None
    assert type(module) is Attention and type(module.inner) is nn.Linear, "only a copy is changed"


class Mixed(nn.Module):
    """Multiplies what it has computed with a table of its own."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3 * 8 * 8, 16)
        self.head = nn.Linear(16, 10)
        self.register_buffer("table", torch.eye(16))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.gelu(self.inner(F.adaptive_avg_pool2d(images, 8).flatten(1))) @ self.table)


def mixed_step(plain: dict[str, Any]) -> tuple[float, list[str]]:
    with start("cpu") as runtime:
        torch.manual_seed(0)
        said: list[str] = []
        engine, _, _ = build_model(load_config(plain), 10, runtime, 10, said.append, model=Mixed())
        loss = engine.train_step(random_batch(runtime)).loss.item()
        assert all(f.values.dtype == torch.float32 for f in engine.fragments())
        return loss, said


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("zero2", marks=pytest.mark.long)])
def test_a_model_that_mixes_formats_computes_under_autocast(tmp_path: Path, strategy: str) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        plain = recipe(tmp_path, parallel={"strategy": strategy, "precision": precision}, train={"global_batch": 8})
        plain["model"] = {"name": "Mixed", "image_size": 32}
        losses[precision], notes = run_ranks(mixed_step, 2, plain)[0]
        assert any("computes under autocast: its own forward mixes" in note for note in notes) == (precision == "bf16")
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2) and losses["bf16"] != losses["fp32"]


# Autocast.


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_amp_bf16_is_autocast(name: str) -> None:
    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=10)
    size = timm.data.resolve_model_data_config(module)["input_size"][-1]
    images, labels = torch.randn(4, 3, size, size), torch.randint(0, 10, (4,))
    twin = copy.deepcopy(module)
    with torch.autocast("cpu", BF16):
        outputs = twin(images)
    F.cross_entropy(outputs.float(), labels).backward()
    expected = torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])
    assert torch.equal(gradient(module, images, labels, Computing(BF16, autocast=True), []), expected)


def run_under_autocast(plain: dict[str, Any]) -> list[float]:
    with torch.autocast("cpu", BF16):
        return run(plain)


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16", pytest.param("bf16", marks=pytest.mark.long)])
def test_a_callers_autocast_changes_nothing(tmp_path: Path, precision: str) -> None:
    short = {"steps": 3, "eval_every": 2}
    made = [
        recipe(tmp_path / name, train=short, parallel={"strategy": "ddp", "precision": precision})
        for name in ("plain", "under")
    ]
    expected = run_ranks(run, 1, made[0])[0]
    assert run_ranks(run_under_autocast, 1, made[1])[0] == expected
    assert len(expected) == 3 and all(map(math.isfinite, expected))
    kept = [load_file(tmp_path / name / "step-00000003" / "model.safetensors") for name in ("plain", "under")]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])
