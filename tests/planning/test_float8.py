"""Plans of fp8: the state is bf16's to the byte, products take less time, and GPUs without fp8 are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bigvision.config import Config, load_config, with_values
from bigvision.errors import UserError
from bigvision.models.float8 import SHARE
from bigvision.planning.estimates import Estimates
from bigvision.planning.hardware import Rates, parse_hardware, peak_of
from bigvision.planning.operations import Work
from bigvision.planning.timing import SHARES, Clock

MODEL = {"name": "vit_giant_patch14_224", "num_classes": 10, "options": {"depth": 4}}


def configured(precision: str, **parallel: Any) -> Config:
    keys = {"strategy": "ddp", "precision": precision, "device": "cuda", "compile": True} | parallel
    return load_config({"model": MODEL, "parallel": keys, "train": {"global_batch": 64, "micro_batch": 64}})


@pytest.mark.parametrize(("strategy", "ranks"), [("ddp", 1), pytest.param("fsdp", 8, marks=pytest.mark.long)])
def test_state_is_that_of_bf16_and_products_are_faster(strategy: str, ranks: int) -> None:
    estimates = Estimates(parse_hardware(f"{ranks}xH100"))
    bf16, fp8 = (
        with_values(configured(name, strategy=strategy, compile=ranks > 1), {"train.global_batch": 64 * ranks})
        for name in ("bf16", "fp8")
    )
    (before, after), times = map(estimates.memory, (bf16, fp8)), [estimates.time(one).total for one in (bf16, fp8)]
    for key in ("parameters", "buffers", "optimizer", "ema", "gradients", "buckets", "scalars", "images", "state"):
        assert getattr(before, key) == getattr(after, key), key
    assert 0.95 * before.peak < after.peak < 1.05 * before.peak
    # Where no compiler fuses the casts into what is around them, they cost more than the products gain.
    assert (times[1] < 0.99 * times[0]) is (ranks > 1)
    found = estimates.profile(fp8)
    formats = {(part.path, work.format) for part in found.parts for work in part.forward_operations if work.kind == "product"}
    assert {path for path, name in formats if name == "fp8"} == {"blocks.1", "blocks.2"}
    kinds = {part.path: part.kind for part in found.parts if part.path}
    assert kinds["blocks.0"] == kinds["blocks.3"] != kinds["blocks.1"] == kinds["blocks.2"]
    assert found.flops == pytest.approx(estimates.profile(bf16).flops, rel=1e-6), "as many operations"
    small = with_values(fp8, {"train.global_batch": ranks, "train.micro_batch": 1})
    assert estimates.profile(small) is not found, "with few rows no layer is worth it"
    assert not [w for part in estimates.profile(small).parts for w in part.forward_operations if w.format == "fp8"]


def test_gpus_without_fp8_are_refused() -> None:
    config = configured("fp8")
    Estimates(parse_hardware("H100")).check(config)
    with pytest.raises(UserError, match=r"no peak of fp8 is known for A100-80 .*: use bf16"):
        Estimates(parse_hardware("A100")).check(config)
    device = parse_hardware("H100").device
    assert peak_of(device, "fp8") == peak_of(device, "amp_bf16") == device.flops["bf16"] != peak_of(device, "fp32")
    assert peak_of(replace(device, flops={}), "fp8") is None


def test_where_rates_were_measured_fp8_is_as_much_faster_as_on_paper() -> None:
    device = parse_hardware("H100").device
    measured = replace(device, rates=Rates({"product bf16": ((1.0, 4e14),), "bytes": ((1.0, 1e12),)}, 0.0, 1.0))
    for clock in (Clock(device), Clock(measured)):
        bf16, fp8 = (clock.works([Work("product", name, 1e16, 0.0)], 1).device for name in ("bf16", "fp8"))
        assert bf16 / fp8 == pytest.approx(SHARE / SHARES["product"] * device.flops["fp8"] / device.flops["bf16"], rel=1e-4)
