"""Frozen parameters: a backbone under a head, a frozen stem, nothing to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from bigvision.errors import UserError
from tests.distributed import run_ranks
from tests.recipes import losses, recipe

LONG = pytest.mark.long
LAYOUTS = [
    ("fsdp", 3, {}), ("zero2", 2, {}), ("zero3", 3, {}), ("pipeline", 2, {}), pytest.param("zero1", 2, {}, marks=LONG),
    pytest.param("fsdp", 4, {"replicas": 2}, marks=LONG), pytest.param("pipeline", 4, {"stages": 2}, marks=LONG),
    pytest.param("pipeline", 2, {"schedule": "interleaved"}, marks=LONG),
]  # fmt: skip


def vit(num_classes: int = 10) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=48, num_heads=3, num_classes=num_classes
    )


def head_only(num_classes: int = 10) -> nn.Module:
    model = vit(num_classes).requires_grad_(False)
    model.get_classifier().requires_grad_(True)  # pyright: ignore
    return model


def frozen_stem(num_classes: int = 10) -> nn.Module:
    model = vit(num_classes)
    for name in ("patch_embed", "blocks.0"):
        model.get_submodule(name).requires_grad_(False)
    model.pos_embed.requires_grad_(False)  # pyright: ignore
    return model


def nothing(num_classes: int = 10) -> nn.Module:
    return vit(num_classes).requires_grad_(False)


KINDS = {"head": head_only, "stem": frozen_stem, "nothing": nothing}


def run_frozen(plain: dict[str, Any], kind: str) -> list[float]:
    from bigvision.config import load_config
    from bigvision.training import train_on_rank

    train_on_rank(load_config(plain), model=KINDS[kind])
    return losses(Path(plain["out"]))


def made(out: Path, strategy: str, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    plain = recipe(
        out, train={"steps": 6, "micro_batch": 6}, optim={"lr": 1e-2},
        parallel={"strategy": strategy, "precision": precision, **more},
    )  # fmt: skip
    return plain | {"model": {"image_size": 32}}


@pytest.mark.parametrize(("strategy", "ranks", "more"), LAYOUTS)
@pytest.mark.parametrize("kind", ["head", pytest.param("stem", marks=pytest.mark.long)])
def test_losses_are_those_of_one_process(tmp_path: Path, kind: str, strategy: str, ranks: int, more: dict[str, Any]) -> None:
    reference = run_ranks(run_frozen, 1, made(tmp_path / "ddp", "ddp"), kind)[0]
    found = run_ranks(run_frozen, ranks, made(tmp_path / "other", strategy, **more), kind)[0]
    assert found == pytest.approx(reference, rel=1e-5) and len(set(reference)) == 6
    one, other = (tmp_path / name / "step-00000006" for name in ("ddp", "other"))
    assert load_file(one / "optimizer.safetensors").keys() == load_file(other / "optimizer.safetensors").keys()


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("zero1", marks=LONG), pytest.param("zero3", marks=LONG)])
def test_frozen_weights_keep_their_bits_in_half_precision(tmp_path: Path, strategy: str) -> None:
    """DeepSpeed keeps fp32 values of what it trains only; a resumed run goes on from the same values."""
    run_ranks(run_frozen, 1, made(tmp_path / "ddp", "ddp"), "head")
    plain = made(tmp_path / "other", strategy, "bf16")
    plain["checkpoint"] = {"every": 3}
    whole = run_ranks(run_frozen, 3, plain, "head")[0]
    one, other = (load_file(tmp_path / name / "step-00000006" / "model.safetensors") for name in ("ddp", "other"))
    assert all(torch.equal(one[name], other[name]) for name in one if not name.startswith("head"))
    assert not torch.equal(one["head.weight"], other["head.weight"])
    again = made(tmp_path / "again", strategy, "bf16")
    again["checkpoint"] = {"resume": str(tmp_path / "other" / "step-00000003")}
    assert run_ranks(run_frozen, 3, again, "head")[0] == whole[3:]


def refuse(plain: dict[str, Any]) -> str:
    try:
        run_frozen(plain, "nothing")
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "pipeline"])
def test_nothing_to_train_is_one_line(tmp_path: Path, strategy: str) -> None:
    for said in run_ranks(refuse, 2, made(tmp_path, strategy)):
        assert "all parameters" in said and "frozen" in said
