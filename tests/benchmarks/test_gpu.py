"""The arithmetic and the files of the GPU benchmark; its sides run in ``python -m benchmarks.gpu --device cpu``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import PARTS, SPECIAL, Results, check_losses
from benchmarks.gpu_sides import RESNET_50, VIT_L, Bench, Side, figures, idle_of, peak_of
from bigvision.runtime import start


def test_idle_is_what_no_kernel_covers() -> None:
    assert idle_of([]) is None and idle_of([(3, 3)]) is None
    assert idle_of([(0, 10)]) == 0.0
    # Two streams overlap from 4 to 6; nothing runs from 8 to 10.
    assert idle_of([(10, 20), (0, 6), (4, 8), (5, 6)]) == pytest.approx(0.1)


def test_rate_and_share_of_the_peak() -> None:
    found = figures([240.0, 240.0, 240.0, 480.0], images=96, flops=1e12, peak=1e15, ranks=1)
    assert found == pytest.approx({"ms": 240.0, "mean/median": 1.25, "images/s": 400.0, "mfu": 0.4})
    assert figures([100.0], images=200, flops=1e12, peak=1e15, ranks=2)["mfu"] == pytest.approx(1.0)
    assert figures([100.0], images=200, flops=1e12, peak=None, ranks=2)["mfu"] is None
    assert peak_of("NVIDIA H100 80GB HBM3", None) == 989e12 and peak_of("another", None) is None
    assert peak_of("another", 5e12) == 5e12


@pytest.mark.parametrize(("model", "operations"), [(VIT_L, 369e9), (RESNET_50, 24.3e9)])
def test_operations_of_an_image(model: Any, operations: float) -> None:
    """Published: 61.5 and 4.1 billion multiply-adds of the forward pass."""
    bench = Bench.__new__(Bench)
    bench.name, bench.options, bench.side = model.name, {}, 224
    assert bench.flops() == pytest.approx(operations, rel=0.02)


def test_parts_stand_beside_each_other_in_the_files(tmp_path: Path) -> None:
    facts = {"ms": 2.0, "ratio": 1.0, "interval": (1.0, 1.0), "idle": None, "bound": None}
    found = {"model": "m", "batch": 4, "ranks": 1, "sides": {"hand-written": facts, "other": {"missing": "no such key"}}}
    for part in ("vit_l", "resnet_50", "vit_l"):
        Results(argparse.Namespace(part=part, results=tmp_path, device="cpu"), writes=True).put(found)
    Results(argparse.Namespace(part="vit_h", results=tmp_path, device="cpu"), writes=False).put(found)
    written = json.loads((tmp_path / "gpu_dry_run_on_the_cpu.json").read_text())
    assert list(written["parts"]) == ["vit_l", "resnet_50"]
    text = (tmp_path / "gpu_dry_run_on_the_cpu.md").read_text()
    assert text.count("| hand-written | 2.0 | 1.000 (1.000 to 1.000) |") == 2 and text.count("no such key") == 2
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]


def test_sides_that_do_other_work_are_found() -> None:
    check_losses({"one": {"loss": 2.30}, "other": {"loss": 2.31}, "third": {"missing": "x"}})
    with pytest.raises(AssertionError, match="first losses"):
        check_losses({"one": {"loss": 2.3}, "other": {"loss": 2.4}})


def test_every_part_is_named_once_and_has_a_baseline() -> None:
    assert not set(PARTS) & set(SPECIAL)
    for part in PARTS.values():
        names = [side.name for side in part.sides]
        assert names and len(set(names)) == len(names)


def test_sides_start_from_the_same_loss() -> None:
    with start("cpu") as runtime:
        bench = Bench(VIT_L, runtime)
        sides = [Side("hand-written"), Side("hand-written", channels_last=True), Side("bigvision", "ddp"), Side("fully_shard")]
        losses = [float(bench.build(side)(*bench.data)) for side in sides]
        assert losses == pytest.approx([losses[0]] * 4, rel=5e-3)
        assert torch.isfinite(torch.tensor(losses)).all()
