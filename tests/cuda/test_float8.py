"""fp8 on a device that multiplies it: products, losses, compiled blocks."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bigvision.models.float8 import CAPABILITY, Float8Linear, check_float8, product, use_float8
from tests.cuda.jobs import job
from tests.cuda.runs import DATA_PARALLEL, compiler, device, on_cpu, plain
from tests.recipes import recipe, run

LACKING = not on_cpu() and torch.cuda.is_available() and torch.cuda.get_device_capability() < CAPABILITY
pytestmark = pytest.mark.skipif(LACKING, reason="this GPU does not multiply fp8")
NEAR = 6e-3
"""By how much a loss in fp8 may differ from the CPU's in fp8, relative: twice what is allowed in bf16."""
FP8: dict[str, Any] = {"precision": "fp8", "fp8_layers": ["blocks.1"]}


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.float().cpu() - exact.float().cpu()).norm() / exact.float().cpu().norm())


@pytest.mark.parametrize(("rows", "wide", "out"), [(257, 1408, 4224), (1028, 4096, 1536), (5, 16, 16)])
def test_products_are_those_of_the_cpu(figure: Callable[[str], None], rows: int, wide: int, out: int) -> None:
    """Up to bf16's rounding and the shorter sums of fast accumulation."""
    check_float8(torch.device(device()))
    torch.manual_seed(0)
    left, right = torch.randn(rows, wide).bfloat16(), torch.randn(out, wide).bfloat16()
    expected, found = product(left, right), product(left.to(device()), right.to(device()))
    apart, error = off(found, expected), off(found, left.float() @ right.float().t())
    figure(f"fp8 product {rows} x {wide} x {out}: {apart:.1e} from the CPU's, {error:.1e} from fp32's")
    assert apart < 5e-3 and 1e-2 < error < 6e-2


def test_gradients_of_weights_are_those_of_bf16() -> None:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(128, 256)).to(device(), torch.bfloat16)
    inputs, gradient = (torch.randn(64, wide, device=device()).bfloat16() for wide in (128, 256))
    layers(inputs).backward(gradient)
    expected, layers[0].weight.grad = layers[0].weight.grad, None  # type: ignore[union-attr]
    use_float8(layers, frozenset({"0"}))
    assert type(layers[0]) is Float8Linear
    layers(inputs).backward(gradient)
    assert off(layers[0].weight.grad, expected) < 3e-3  # type: ignore[arg-type]


def sections(**keys: Any) -> dict[str, Any]:
    return {"train": {"steps": 20, "micro_batch": 8}, "optim": {"lr": 5e-4}, "parallel": FP8 | keys}


def reference(folder: Path) -> list[float]:
    """The losses of one process on the CPU, in fp8."""
    return run(recipe(folder / "run", **sections()))


def case(folder: Path, strategy: str, compiled: bool) -> list[float] | str:
    """The losses of a run on the device; of one that failed its traceback."""
    try:
        return run(plain(folder / "run", **sections(strategy=strategy, compile=compiled)))
    except Exception:
        return traceback.format_exc()


@pytest.mark.parametrize(
    ("strategy", "compiled"),
    [
        pytest.param(strategy, compiled, marks=[job(case, strategy, compiled, seconds=60), *([compiler()] if compiled else [])])
        for strategy in DATA_PARALLEL
        for compiled in (False, True)
    ],
)
@job(reference, seconds=40)
def test_losses_are_those_of_the_cpu(
    results: Callable[..., Any], figure: Callable[[str], None], strategy: str, compiled: bool
) -> None:
    expected, found = results(reference), results(case, strategy, compiled)
    assert not isinstance(found, str), found
    apart = max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))
    figure(f"fp8 {strategy}{', compiled' if compiled else ''}: losses differ from the CPU's by at most {apart:.1e}")
    assert apart < NEAR and len(set(found)) > 15
