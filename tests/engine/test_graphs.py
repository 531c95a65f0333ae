"""Passes that run as CUDA graphs, here as an imitation of them: not a byte of a run depends on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import bigvision
from bigvision.config import load_config
from bigvision.engine import check_engine
from bigvision.errors import UserError
from bigvision.runtime import start
from bigvision.tasks import Classify
from tests.distributed import run_ranks
from tests.graphs import Imitation, on_the_cpu
from tests.recipes import MODELS, digests, recipe, run

LONG = pytest.mark.long
DROPS = {"drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}


def graphed(plain: dict[str, Any]) -> tuple[list[float], list[int]]:
    """The losses of a run on this rank, and how often each graph was launched."""
    with on_the_cpu() as found:
        losses = run(plain)
    return losses, [graph.launches for one in found for graph in one.graphs]


def options(model: str, **more: Any) -> dict[str, Any]:
    return {"options": MODELS[model].get("options", {}) | more}


# Of 20 samples in micro-batches of 6: the first writes gradients, two and a short one add to them.
PLAIN = {"train": {"steps": 4, "global_batch": 20, "micro_batch": 6}, "optim": {"warmup": 1, "clip": 0.5}}
MIX = {"mixup": 0.8, "cutmix": 1.0}
SKIP = {"drop_path": 0.4, "drop_path_schedule": "constant", "drop_path_mode": "skip"}
MASK = {"drop_path": 0.4, "drop_path_mode": "mask"}
TEACHER = MODELS["vit"]
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # model, keys of the model, other keys
    "vit, skip": ("vit", SKIP | options("vit", **DROPS), {"task": MIX, "parallel": {"precision": "bf16"}, "ema": {"decay": 0.9}}),
    "vit, mask": ("vit", MASK | options("vit", **DROPS), {"task": MIX, "parallel": {"precision": "amp_bf16"}}),
    "resnet": ("resnet", {}, {"task": MIX, "ema": {"decay": 0.9}}),
    "resnet, bf16": ("resnet", {}, {"parallel": {"precision": "bf16", "channels_last": "always"}}),
    "resnet, momentum": ("resnet", {}, {"optim": {"name": "sgd", "warmup": 0}}),
    "frozen": ("vit", {"trainable": "last:1", "frozen_dtype": "bf16"}, {"parallel": {"precision": "bf16"}}),
    "frozen norms": ("resnet", {"trainable": "head"}, {}),
    "lora": ("vit", {"lora": {"rank": 2}} | options("vit", **DROPS), {"parallel": {"precision": "amp_bf16"}}),
    "weights": ("vit", {}, {"task": MIX | {"class_weights": [0.1, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.0, 0.25, 1.0]}}),
    "more outputs": (
        "small", {"num_classes": 12}, {"task": {"class_weights": [0.1, 2.0, 0.5, 1.0, 0.0, 3.0, 1.0, 1.0, 0.25, 1.0]}},
    ),
    "fp16": ("vit", options("vit", **DROPS), {"parallel": {"precision": "fp16"}}),
    "muon": ("small", {}, {"optim": {"name": "muon", "warmup": 0}}),
    "sizes": (
        "vit", {}, {
            "train": {"steps": 6, "global_batch": 20, "micro_batch": 6}, "task": MIX,
            "data": {"resize_schedule": [{"until": 0.34, "image_size": 16}, {"until": 0.7, "image_size": [24, 40]}]},
        },
    ),
    "swin": ("swin", SKIP, {"parallel": {"precision": "bf16"}}),
    "convnext": ("convnext", SKIP, {"parallel": {"precision": "bf16", "channels_last": "always"}}),
    "efficientnet": ("efficientnet", MASK, {}),
    "segment": ("pyramid", {}, {"task": {"name": "segment"}, "data": {"train": "synthetic-masks:40x64", "val": "synthetic-masks:8x64"}}),
}  # fmt: skip
ESSENTIAL = ("vit, skip", "resnet")


def made(out: Path, name: str, **parallel: Any) -> dict[str, Any]:
    model, keys, sections = RUNS[name]
    sections = PLAIN | sections
    plain = recipe(out, model, **sections | {"parallel": sections.get("parallel", {}) | parallel})
    return plain | {"model": plain["model"] | keys}


@pytest.mark.parametrize("name", [name if name in ESSENTIAL else pytest.param(name, marks=LONG) for name in RUNS])
def test_a_run_has_the_same_bytes(tmp_path: Path, name: str) -> None:
    eager = made(tmp_path / "eager", name)
    reference = run_ranks(run, 1, eager)[0]
    losses, launches = run_ranks(graphed, 1, made(tmp_path / "graphs", name, cuda_graphs=True))[0]
    assert losses == reference and len(set(losses)) == len(losses)
    step = f"step-{eager['train']['steps']:08}"
    assert digests(tmp_path / "graphs" / step) == digests(tmp_path / "eager" / step)
    # First, second and third, short.
    assert launches == ([2, 4, 2] * 3 if name == "sizes" else [4, 8, 4]) 


@pytest.mark.parametrize("graphs", [True, False])
def test_a_run_resumes_with_the_same_bytes(tmp_path: Path, graphs: bool) -> None:
    """Also without graphs where it had some."""
    plain = made(tmp_path / "run", "vit, skip", cuda_graphs=True) | {"checkpoint": {"every": 2, "keep": 9}}
    whole, _ = run_ranks(graphed, 1, plain)[0]
    expected = digests(tmp_path / "run" / "step-00000004")
    shutil.rmtree(tmp_path / "run" / "step-00000004")
    (tmp_path / "run" / "latest").unlink(missing_ok=True)
    plain["parallel"]["cuda_graphs"] = graphs
    losses, launches = run_ranks(graphed, 1, plain)[0]
    assert losses[-2:] == whole[2:] and bool(launches) == graphs
    assert digests(tmp_path / "run" / "step-00000004") == expected
