"""fp8: products against torchao's, which layers, strategies, resuming, and losses over 300 steps. On the CPU torch computes the
same operation as on CUDA."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bigvision.config import LoraConfig, ModelConfig, load_config
from bigvision.engine.parallelize import Computing
from bigvision.errors import UserError
from bigvision.models import blueprint, find_blocks, float8
from bigvision.models.float8 import (
    Float8,
    Float8Linear,
    Float8LoraLinear,
    check_float8,
    choose_float8,
    product,
    rows_of,
    speedup,
    use_float8,
)
from bigvision.runtime import start
from bigvision.training.build import build_model
from tests.distributed import run_ranks
from tests.planning.test_memory import written_teacher
from tests.recipes import MODELS, digests, lines, losses, recipe, run

LONG = pytest.mark.long
FP8: dict[str, Any] = {"precision": "fp8", "fp8_layers": ["blocks.1"]}
"""The second of three blocks: auto takes none of so narrow a model."""
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp2": (2, {}), "ddp3": (3, {}), "ddp4": (4, {}), "fsdp2": (2, {"strategy": "fsdp"}), "fsdp3": (3, {"strategy": "fsdp"}),
    "hybrid": (4, {"strategy": "fsdp", "replicas": 2}), "zero1": (2, {"strategy": "zero1"}),
    "zero2": (2, {"strategy": "zero2"}), "zero3": (2, {"strategy": "zero3"}), "pipeline": (2, {"strategy": "pipeline"}),
    "sharded stages": (4, {"strategy": "pipeline", "stages": 2}),
}  # fmt: skip
SHORT = {"steps": 6, "micro_batch": 6}


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).detach().norm() / exact.detach().norm())


# The products.


def passes(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, and gradients of the inputs, the weight and the bias, in fp32."""
    entering = inputs.clone().requires_grad_()
    output = layer(entering)
    output.backward(gradient.to(output.dtype))
    return [one.float() for one in (output.detach(), entering.grad, layer.weight.grad, layer.bias.grad)]  # type: ignore[union-attr]


def as_on_cuda(first: Tensor, second: Tensor, rows: Tensor, columns: Tensor, **options: Any) -> Tensor:
    """``_scaled_mm`` that refuses what it refuses on CUDA for scales of rows; the CPU takes other layouts too."""
    assert first.is_contiguous() and second.t().is_contiguous() and not any(size % 16 for size in second.shape)
    assert rows.shape == (len(first), 1) and columns.shape == (1, second.shape[1])
    assert all(scale.dtype == torch.float32 and scale.is_contiguous() for scale in (rows, columns))
    return _scaled_mm(first, second, rows, columns, **options)


_scaled_mm = torch._scaled_mm


def test_a_layer_computes_what_torchao_does_and_gradients_of_weights_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    monkeypatch.setattr(torch, "_scaled_mm", as_on_cuda)
    torch.manual_seed(0)
    plain = nn.Linear(96, 160)
    with torch.no_grad():  # for the gradient of the input torchao scales all columns alike
        plain.weight *= torch.logspace(-2, 1, 96)
    plain = plain.bfloat16()
    inputs = (torch.randn(3, 7, 96) * torch.logspace(-2, 2, 7).view(1, 7, 1)).bfloat16()
    gradient = torch.randn(3, 7, 160).bfloat16()
    exact = passes(copy.deepcopy(plain).float(), inputs.float(), gradient)
    rounded = passes(copy.deepcopy(plain), inputs, gradient)
    ours = use_float8_in(copy.deepcopy(plain))
    assert type(ours) is Float8Linear
    found = passes(ours, inputs, gradient)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), emulate=True)
    theirs = passes(convert_to_float8_training(nn.Sequential(copy.deepcopy(plain)), config=config)[0], inputs, gradient)
    for place in (0, 2, 3):
        assert torch.equal(found[place], theirs[place])
    assert torch.equal(found[2], rounded[2]) and off(found[2], exact[2]) < 3e-3, "the gradient of the weight is bf16's"
    assert 1e-2 < off(found[0], exact[0]) < 5e-2 and 1e-2 < off(found[1], exact[1]) < 5e-2, "these two are in fp8"
    assert off(found[1], theirs[1]) < 5e-3
    # As fp32 masters under ddp, and where the inputs have no gradient.
    held = use_float8_in(plain.float())
    first = held(inputs)
    first.backward(gradient)
    assert first.dtype == torch.bfloat16 and torch.equal(first.float(), found[0])
    assert torch.equal(held.weight.grad, found[2]) and torch.equal(held.bias.grad, found[3])


def use_float8_in(layer: nn.Module) -> Any:
    use_float8(nn.Sequential(layer), frozenset({"0"}))
    return layer


def test_a_product_of_rows_does_not_depend_on_other_rows_or_on_powers_of_two() -> None:
    """So ranks and micro-batches of any size round alike, and so do two ranks, whose losses are multiplied by two."""
    torch.manual_seed(0)
    rows, weight = torch.randn(64, 96).bfloat16(), torch.randn(32, 96).bfloat16()
    assert torch.equal(product(rows, weight)[:16], product(rows[:16], weight))
    assert torch.equal(product(4 * rows, weight), 4 * product(rows, weight))
    assert not product(torch.zeros_like(rows), weight).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    rows = torch.randn(4, 32)
    rows[1, 3] = value
    assert product(rows.bfloat16(), torch.randn(16, 32).bfloat16()).isfinite().all(1).tolist() == [True, False, True, True]


# Which layers.


def giant(**options: Any) -> nn.Module:
    """ViT-g/14 with few blocks, on meta."""
    with torch.device("meta"):
        return timm.create_model("vit_giant_patch14_224", **{"depth": 6, "num_classes": 10, "drop_path_rate": 0.0} | options)


def chosen(module: nn.Module, images: int = 64, asked: Any = "auto", shape: tuple[int, int, int] = (3, 224, 224)) -> Any:
    return choose_float8(module, find_blocks(module, shape[1]), shape, images, asked)


def test_wide_layers_of_inner_blocks_are_chosen() -> None:
    found = chosen(module := giant().eval())
    assert not any(part.training for part in module.modules()), "the mode is as before"
    kinds = ("attn.qkv", "mlp.fc1", "mlp.fc2")
    assert found.names == {f"blocks.{block}.{kind}" for block in range(1, 5) for kind in kinds}
    assert found.note == (
        "parallel.precision: fp8: 12 of 25 linear layers (attn.qkv, mlp.fc1, mlp.fc2); the others in bf16: 8 in the first or "
        "last block (attn.proj, attn.qkv, mlp.fc1, mlp.fc2), 4 too narrow to gain (attn.proj), 1 outside of the blocks (head)"
    )
    assert not chosen(giant(), images=2).names, "with few rows to cast the weights takes what is gained"
    assert chosen(giant(num_classes=21841)).names == found.names, "a head that is a block of its own is not the last block"
    assert not chosen(timm.create_model("vit_base_patch16_224", depth=4)).names, "768 are too narrow"
    assert len(chosen(module.requires_grad_(False)).names) == 16, "a frozen attn.proj has no product that stays in bf16"


def test_the_roofline() -> None:
    assert speedup(1e9, 1 << 14, 1 << 14) == pytest.approx(3 / (1 + 2 * float8.BF16_FLOPS / float8.FP8_FLOPS), rel=0.1)
    assert speedup(16384, 1408, 6144) > speedup(16384, 1024, 4096) > 1.05 > speedup(16384, 768, 768)
    assert speedup(16384, 1408, 6144) > speedup(1024, 1408, 6144)
    assert speedup(16384, 1408, 6144, trained=False) > speedup(16384, 1408, 6144), "without the product that stays in bf16"


def test_layers_that_are_named() -> None:
    module = giant()
    assert chosen(module, asked=("blocks.*.mlp.fc1", "blocks.0.attn")).names == {
        "blocks.0.attn.qkv", "blocks.0.attn.proj", *(f"blocks.{block}.mlp.fc1" for block in range(6))
    }  # fmt: skip
    with pytest.raises(UserError, match=r"fp8_layers: 'blocks\.\*\.fc9' matches no linear layer; the nearest names are blocks"):
        chosen(module, asked=("blocks.*.fc9",))
    with pytest.raises(UserError, match=r"fp8_layers: head is 1408 to 10 wide, which are not both multiples of 16: leave"):
        chosen(module, asked=("head",))
    with pytest.raises(UserError, match="which reads its weight in another way"):
        chosen(nn.Sequential(nn.Flatten(), _ReadsWeight()), asked=("1.inner",), shape=(3, 4, 4))


def test_of_several_calls_the_one_with_the_fewest_rows_counts() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](self[0](x)) + self[1](x.flatten(1)[:, :48])[:, None]

    assert dict(rows_of(Twice(nn.Flatten(2), nn.Linear(48, 16, device="meta")), (5, 4, 12))) == {"1": 1}


class _ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight.t()


def test_adapters_stay_in_bf16_and_a_frozen_layer_computes_no_gradient() -> None:
    plan = blueprint(ModelConfig(**MODELS["vit"], lora=LoraConfig(rank=16)), 10)
    module = plan.module
    found = choose_float8(module, find_blocks(module, 32), plan.input_shape, 8, ("blocks.1",))
    assert found.names == {f"blocks.1.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    use_float8(module, found.names)
    layer = module.get_submodule("blocks.1.mlp.fc1")
    assert type(layer) is Float8LoraLinear and type(layer.lora_A) is nn.Linear
    layer = layer.to_empty(device="cpu").bfloat16()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.weight.requires_grad_(False)
    inputs, saved = torch.randn(5, 48).bfloat16().requires_grad_(), list[int]()
    with saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor):
        Float8Linear.forward(layer, inputs)
    assert saved == [layer.weight.data_ptr()], "nor does it keep its inputs"
    adapted = layer(inputs)
    assert torch.equal(adapted, Float8Linear.forward(layer, inputs) + layer.lora_B(layer.lora_A(inputs)) * layer.scaling)
    adapted.sum().backward()
    assert layer.weight.grad is None and layer.lora_A.weight.grad is not None and inputs.grad is not None


# Refusals.


def test_settings_that_no_run_can_have() -> None:
    for parallel, text in (
        ({"fp8_layers": ["blocks"]}, r"fp8_layers: \[blocks\] needs parallel.precision: fp8"),
        ({"precision": "fp8", "fp8_layers": []}, r"fp8_layers: \[\] names no layer"),
        ({"precision": "fp8", "strategy": "pipeline", "schedule": "zbv"}, r"fp8 excludes parallel.schedule: zbv.*or bf16"),
    ):
        with pytest.raises(UserError, match=text):
            load_config({"parallel": parallel})


def test_a_gpu_that_does_not_multiply_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_float8(torch.device("cpu"))
    found: dict[str, Any] = {"get_device_name": "NVIDIA A100", "get_device_capability": (8, 0)}
    for name in found:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: found[name])
    with pytest.raises(UserError, match=r"8\.9 or newer .*NVIDIA A100 has 8\.0: use bf16"):
        check_float8(torch.device("cuda"))
    found["get_device_capability"] = (12, 0)

    def lacking(left: Tensor, right: Tensor) -> Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")

    monkeypatch.setattr(float8, "product", lacking)
    monkeypatch.setattr(torch, "ones", lambda *shape, **options: torch.empty(shape))
    with pytest.raises(UserError, match=r"cannot be computed on NVIDIA A100 \(CUBLAS_STATUS_NOT_SUPPORTED\): use bf16$"):
        check_float8(torch.device("cuda"))


# Strategies.


def plain(out: Path, parallel: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return recipe(out, train=SHORT | sections.pop("train", {}), parallel=FP8 | parallel, **sections)


def test_all_stages_of_a_rank_have_layers_in_fp8() -> None:
    stages = [nn.ModuleDict({name: nn.Linear(16, 16)}) for name in ("first", "last")]
    names = Float8(frozenset({"first", "last"}), "")
    Computing(torch.bfloat16, float8=names).apply(stages, [], True, torch.device("cpu"))
    assert all(isinstance(layer, Float8Linear) for stage in stages for layer in stage.values())


def test_an_engine_asks_for_its_micro_batch_and_device_and_its_teacher_is_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, devices = list[int](), list[str]()

    def chooses(module: nn.Module, blocks: Any, shape: Any, count: int, asked: Any) -> Float8:
        images.append(count)
        return choose_float8(module, blocks, shape, count, asked)

    monkeypatch.setattr("bigvision.engine.parallelize.choose_float8", chooses)
    monkeypatch.setattr("bigvision.engine.engine.check_float8", lambda device: devices.append(device.type))
    config = load_config(plain(tmp_path / "run", {"strategy": "ddp"}, task={"teacher": written_teacher(tmp_path)}))
    with start("cpu") as runtime:
        engine = build_model(config, 10, runtime, 9, lambda text: None)[0]
        counts = [sum(isinstance(p, Float8Linear) for p in one.modules()) for one in (engine.module, engine.teacher.module)]
        engine.close()
    assert (images, devices, counts) == ([6], ["cpu"], [4, 0])


@pytest.mark.parametrize("layout", ["fsdp2", *(pytest.param(name, marks=LONG) for name in LAYOUTS if name != "fsdp2")])
def test_losses_are_those_of_one_process(tmp_path: Path, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    reference = run_ranks(run, 1, plain(tmp_path / "one", {}))[0]
    others = run_ranks(run, ranks, plain(tmp_path / "other", parallel))[0]
    # With three ranks losses are multiplied by three, and other gradients are rounded up.
    assert others == pytest.approx(reference, rel=2e-3 if ranks == 3 or "zero" in layout else 1e-4)
    if layout == "fsdp2":
        bf16, fp32 = (
            run_ranks(run, 1, plain(tmp_path / name, {"precision": name, "fp8_layers": "auto"}))[0] for name in ("bf16", "fp32")
        )
        assert reference != bf16 and reference == pytest.approx(fp32, rel=3e-2)
        assert off(torch.tensor(reference), torch.tensor(bf16)) > 1e-5, "fp8 computes something else"


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_resumes_bit_for_bit_and_crosses_to_bf16_and_back(tmp_path: Path, layout: str) -> None:
    ranks, parallel = LAYOUTS[layout]

    def saved(name: str, resume: str = "auto", **other: Any) -> dict[str, Any]:
        keys: dict[str, Any] = {"ema": {"decay": 0.5}, "checkpoint": {"every": 3, "keep": 9, "resume": resume}}
        return plain(tmp_path / name, parallel | other, **keys)

    run_ranks(run, ranks, saved("whole"))
    middle, last = (tmp_path / "whole" / f"step-{step:08}" for step in (3, 6))
    run_ranks(run, ranks, saved("on", str(middle)))
    assert losses(tmp_path / "on") == losses(tmp_path / "whole")[3:]
    assert digests(tmp_path / "on" / last.name) == digests(last)
    bf16 = {"precision": "bf16", "fp8_layers": "auto"}
    run_ranks(run, ranks, saved("crossed", str(middle), **bf16))
    crossed = tmp_path / "crossed" / last.name
    assert [path.name for path in sorted(crossed.iterdir())] == [path.name for path in sorted(last.iterdir())]
    for file in ("model.safetensors", "optimizer.safetensors", "ema.safetensors"):
        ours, theirs = ({name: (t.shape, t.dtype) for name, t in load_file(one / file).items()} for one in (last, crossed))
        assert ours == theirs
        assert (last / file).stat().st_size == (crossed / file).stat().st_size
    assert losses(tmp_path / "crossed") == pytest.approx(losses(tmp_path / "on"), rel=2e-2)
    assert losses(tmp_path / "crossed") != losses(tmp_path / "on")
    run_ranks(run, ranks, saved("back", str(crossed)))
    assert digests(tmp_path / "back" / last.name) == digests(crossed), "reading and writing again changes nothing"


@LONG
@pytest.mark.parametrize(
    ("parallel", "within"),
    [({"recompute": "blocks"}, 0.0), ({"recompute": "selective"}, 0.0), ({"recompute": "budget:0.5"}, 0.0),
     ({"compile": True}, 5e-3), ({"compile": True, "recompute": "blocks"}, 5e-3)],
)  # fmt: skip
def test_recompute_and_compiled_blocks(tmp_path: Path, parallel: dict[str, Any], within: float) -> None:
    for strategy in ("ddp", "fsdp"):
        found = [
            run_ranks(run, 2, plain(tmp_path / f"{strategy}{len(more)}", {"strategy": strategy} | more))[0]
            for more in ({}, parallel)
        ]
        assert found[1] == pytest.approx(found[0], rel=within, abs=0.0)


@LONG
@pytest.mark.parametrize("compiled", [False, True])
def test_branches_that_run_on_a_part_of_the_samples(tmp_path: Path, compiled: bool) -> None:
    """Of a layer in fp8 the rows are fewer then, and their number differs."""
    found = []
    for strategy in ("ddp", "fsdp"):
        made = plain(tmp_path / strategy, {"strategy": strategy, "compile": compiled}, train={"micro_batch": 12})
        made["model"] = made["model"] | {"drop_path": 0.5, "drop_path_mode": "skip", "lora": {"rank": 4, "alpha": 8.0}}
        found.append(run_ranks(run, 2, made)[0])
    assert found[0] == pytest.approx(found[1], rel=2e-3)


# Over 300 steps.

STEPS, LAST = 300, 50


def curve(out: Path, precision: str, seed: int) -> float:
    """The mean loss of the last steps of a small ViT that learns handwritten digits."""
    parallel = {"precision": precision} | ({"fp8_layers": ["blocks"]} if precision == "fp8" else {})
    made = recipe(
        out, data={"train": "digits", "val": "digits"}, optim={"lr": 2e-3, "warmup": 20},
        train={"steps": STEPS, "global_batch": 64, "micro_batch": None}, parallel=parallel,
    )  # fmt: skip
    run_ranks(run, 1, made | {"seed": seed})
    found = losses(out)
    assert len(found) == STEPS and sum(found[:10]) / 10 > 2
    assert not any(line.get("skipped") for line in lines(out))
    return sum(found[-LAST:]) / LAST


@LONG
def test_losses_over_300_steps_are_those_of_bf16(tmp_path: Path) -> None:
    """All linear layers of all blocks are in fp8. The bound is how far seeds are apart, and less than 5 %."""
    ends = {p: [curve(tmp_path / f"{p}{seed}", p, seed) for seed in range(3)] for p in ("fp32", "bf16", "fp8")}
    print({precision: [f"{loss:.4f}" for loss in found] for precision, found in ends.items()})
    spread = max(ends["fp32"]) - min(ends["fp32"])
    means = {precision: sum(found) / len(found) for precision, found in ends.items()}
    assert means["fp32"] < 1.5, "it has learned something"
    assert abs(means["fp8"] - means["bf16"]) < max(spread, 0.05 * means["bf16"])
