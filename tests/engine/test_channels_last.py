"""Convolutions computed in channels_last: the same numbers, and checkpoints in logical order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from bigvision import load_config, train
from bigvision.engine.state import make_contiguous
from bigvision.models.formats import likes_channels_last
from bigvision.runtime import start
from bigvision.training.build import build_model
from tests.distributed import run_ranks
from tests.recipes import losses, recipe, run

LONG = pytest.mark.long
LAST = torch.channels_last


def laid_out(tensor: Tensor) -> bool | None:
    """Whether *tensor* is in channels_last; None where that is row-major as well."""
    last = tensor.is_contiguous(memory_format=LAST)
    return None if last and tensor.is_contiguous() else last


def observed(plain: dict[str, Any]) -> tuple[list[float], set[bool | None], set[bool | None]]:
    """The losses of a run, and the layouts of the weights and of the images that convolutions were given."""
    weights: set[bool | None] = set()
    images: set[bool | None] = set()
    conv2d = F.conv2d

    def look(inputs: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weights.add(None if weight.is_meta else laid_out(weight))
        if inputs.shape[1] == 3 and not inputs.is_meta:
            images.add(laid_out(inputs))
        return conv2d(inputs, weight, *args, **kwargs)

    F.conv2d = look  # type: ignore[assignment]
    try:
        return run(plain), weights - {None}, images
    finally:
        F.conv2d = conv2d  # type: ignore[assignment]


LAYOUTS: list[Any] = [("fsdp", 3)]
LAYOUTS += [pytest.param(*layout, marks=LONG) for layout in (("ddp", 2), ("ddp", 1), ("zero2", 2), ("zero3", 2))]


@pytest.mark.parametrize(("strategy", "ranks"), LAYOUTS)
@pytest.mark.parametrize("model", [pytest.param("convnext", marks=LONG), "resnet"])
def test_channels_last_changes_nothing_but_the_layout(tmp_path: Path, model: str, strategy: str, ranks: int) -> None:
    found: dict[str, list[float]] = {}
    for asked in ("never", "always"):
        plain = recipe(
            tmp_path / asked, model, train={"steps": 6, "micro_batch": 4}, optim={"lr": 5e-4},
            parallel={"strategy": strategy, "channels_last": asked},
        )  # fmt: skip
        found[asked], weights, images = run_ranks(observed, ranks, plain)[0]
        assert weights == images == {asked == "always"}
    assert found["always"] == pytest.approx(found["never"], rel=1e-5) and len(set(found["never"])) == 6
    never, always = (load_file(tmp_path / asked / "step-00000006" / "model.safetensors") for asked in found)
    assert [(name, value.shape, value.dtype) for name, value in never.items()] == [
        (name, value.shape, value.dtype) for name, value in always.items()
    ]
    for name, value in never.items():
        assert torch.allclose(value.float(), always[name].float(), rtol=1e-3, atol=1e-4), name


@LONG
@pytest.mark.parametrize("precision", ["bf16", "amp_bf16"])
def test_channels_last_in_bf16(tmp_path: Path, precision: str) -> None:
    found = []
    for asked in ("never", "always"):
        parallel = {"strategy": "fsdp", "channels_last": asked, "precision": precision}
        plain = recipe(tmp_path / asked, "resnet", train={"steps": 3, "micro_batch": 4}, parallel=parallel)
        numbers, weights, images = run_ranks(observed, 2, plain)[0]
        assert weights == images == {asked == "always"}
        found.append(numbers)
    assert found[1] == pytest.approx(found[0], rel=2e-2)


def own(layout: torch.memory_format) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=10, act_layer="silu").to(memory_format=layout)


def first_values(plain: dict[str, Any]) -> list[str]:
    """The tensors of which this rank does not hold the values that the module was given with."""
    given = own(LAST)
    assert any(laid_out(tensor) for tensor in given.parameters() if tensor.ndim == 4)
    with start("cpu") as runtime:
        engine, _, _ = build_model(load_config(plain), 10, runtime, 4, lambda text: None, model=given)
        state, wrong = given.state_dict(), []
        for run_ in (fragment for fragment in engine.fragments() if fragment.group == "model"):
            expected = state[run_.name].reshape(-1)[run_.start : run_.start + run_.values.numel()]
            wrong += [] if torch.equal(run_.values.view(-1), expected) else [run_.name]
        return wrong


def train_own(plain: dict[str, Any], layout: torch.memory_format) -> list[float]:
    train(load_config(plain), model=own(layout))
    return losses(Path(plain["out"]))


OWN = [("ddp", 1), *(pytest.param(name, 2, marks=LONG) for name in ("fsdp", "zero2", "zero3"))]


@pytest.mark.parametrize(("strategy", "ranks"), OWN)
def test_a_module_of_the_callers_in_channels_last(tmp_path: Path, strategy: str, ranks: int) -> None:
    """It crashed: fragments are runs of row-major tensors."""

    def plain(name: str, steps: int) -> dict[str, Any]:
        made = recipe(
            tmp_path / name, train={"steps": steps, "micro_batch": 4}, optim={"schedule": "constant", "warmup": 0},
            parallel={"strategy": strategy}, checkpoint={"every": 2},
        )  # fmt: skip
        return made | {"model": {"name": "ResNet", "image_size": 32}}

    assert run_ranks(first_values, ranks, plain("first", 4)) == [[]] * ranks
    expected = run_ranks(train_own, ranks, plain("rows", 4), torch.contiguous_format)[0]
    assert run_ranks(train_own, ranks, plain("last", 4), LAST)[0] == pytest.approx(expected, rel=1e-5)
    run_ranks(train_own, ranks, plain("resumed", 2), LAST)
    run_ranks(train_own, ranks, plain("resumed", 4), LAST)
    last, resumed = (load_file(tmp_path / name / "step-00000004" / "model.safetensors") for name in ("last", "resumed"))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "last") and all(torch.equal(last[n], resumed[n]) for n in last)


def test_a_module_is_laid_out_row_by_row() -> None:
    with torch.device("meta"):
        module = torch.nn.Conv2d(3, 8, 3).to(memory_format=LAST)
    assert make_contiguous(module) and module.weight.is_contiguous()
    assert not make_contiguous(module), "done already"


@pytest.mark.parametrize(
    ("name", "on_cuda", "on_cpus"),
    [
        ("resnet50", True, False), ("convnext_tiny", True, True), ("efficientnet_b0", True, True), ("regnety_032", False, True),
        ("resnext50_32x4d", False, True), ("vit_tiny_patch16_224", False, False),
        ("swin_tiny_patch4_window7_224", False, False),
    ],
)  # fmt: skip
def test_which_models_like_channels_last(name: str, on_cuda: bool, on_cpus: bool) -> None:
    with torch.device("meta"):
        module = timm.create_model(name)
    assert (likes_channels_last(module, "cuda"), likes_channels_last(module, "cpu")) == (on_cuda, on_cpus)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", True), ("bf16", False)])
def test_auto_takes_it_on_cpus_where_it_was_measured(tmp_path: Path, precision: str, expected: bool) -> None:
    config = load_config(recipe(tmp_path, "convnext", parallel={"strategy": "ddp", "precision": precision}))
    with start("cpu") as runtime:
        engine = build_model(config, 10, runtime, 9, lambda text: None)[0]
        engine.close()
    assert engine.computing.channels_last is expected
