"""How far is a predicted training step from the measured one on this machine?

``python -m benchmarks.plan_time`` on one rank, ``torchrun --nproc_per_node 2 -m benchmarks.plan_time`` on two: it calibrates
as ``bigvision plan --calibrate`` does, builds an engine for each combination and lets them take turns. Writes
``benchmarks/results/plan_time_N_ranks.{json,md}``. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import compare
from bigvision import load_config
from bigvision.data import Batch
from bigvision.planning.calibrate import calibrate
from bigvision.planning.hardware import hardware_here
from bigvision.planning.profile import profile
from bigvision.planning.state import Layout
from bigvision.planning.timing import step_time
from bigvision.runtime import Runtime, start
from bigvision.training.build import build_model

MODELS: dict[str, tuple[str, int]] = {
    "vit": ("vit_tiny_patch16_224", 8), "convnext": ("convnext_atto", 8), "resnet": ("resnet18", 8),
    "swin": ("swin_tiny_patch4_window7_224", 2),
}  # fmt: skip
"""timm's name, and images in a step of each rank."""
ALONE: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("vit", {"strategy": "ddp"}, 1), ("convnext", {"strategy": "ddp"}, 1), ("resnet", {"strategy": "ddp"}, 1),
    ("swin", {"strategy": "ddp"}, 1), ("vit", {"strategy": "ddp"}, 4), ("resnet", {"strategy": "ddp"}, 4),
    ("vit", {"strategy": "ddp", "recompute": "blocks"}, 1), ("convnext", {"strategy": "ddp", "recompute": "blocks"}, 1),
)  # fmt: skip
"""Family, `parallel`, micro-batches of a step."""
SEVERAL: tuple[tuple[str, dict[str, Any], int], ...] = (
    ("resnet", {"strategy": "ddp"}, 1), ("vit", {"strategy": "zero2"}, 1), ("vit", {"strategy": "fsdp"}, 1),
    ("convnext", {"strategy": "fsdp"}, 1),
)  # fmt: skip


def main() -> None:
    """Calibrate, predict, measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args()
    with start("cpu") as runtime:
        calibrate(runtime)
        measure(asked, runtime)


def measure(asked: argparse.Namespace, runtime: Runtime) -> None:
    """All combinations in turns, beside what is predicted of them."""
    hardware = hardware_here(runtime)
    assert hardware is not None
    sides, predicted = {}, {}
    for family, parallel, parts in ALONE if runtime.world_size == 1 else SEVERAL:
        name, images = MODELS[family]
        words = [family, parallel["strategy"], *(["recompute"] if "recompute" in parallel else []), f"{parts} micro-batches"]
        config = load_config(
            {
                "model": {"name": name, "num_classes": 10},
                "parallel": {"precision": "fp32", "device": "cpu"} | parallel,
                "train": {"global_batch": images * runtime.world_size, "micro_batch": images // parts},
            }
        )
        predicted[" ".join(words)] = step_time(
            profile(config, 10), config, Layout.of(config, runtime.world_size), hardware
        ).total
        engine, plan, _ = build_model(config, 10, runtime, 1000, say=lambda text: None)
        pixels = torch.randint(0, 256, (images, *plan.input_shape), dtype=torch.uint8)
        labels = torch.arange(images) % 10
        batch = Batch(pixels, labels, torch.arange(images), torch.ones(images, dtype=torch.bool))
        sides[" ".join(words)] = lambda engine=engine, batch=batch: engine.train_step(batch)
    report = compare("Steps in turns", sides, next(iter(sides)), rounds=asked.rounds, calls=1, warmup=2)
    # As the calibration: what a step takes while nothing else runs.
    measured = {line.name: line.quartiles[0] for line in report.lines}
    rows = ["| combination | measured, ms | predicted, ms | off |", "|---|---:|---:|---:|"]
    for name, seconds in predicted.items():
        off = seconds * 1e3 / measured[name] - 1
        rows.append(f"| {name} | {measured[name]:.1f} | {seconds * 1e3:.1f} | {off:+.0%} |")
    if runtime.is_main:
        print("\n".join(rows))
        stem = asked.results / f"plan_time_{runtime.world_size}_ranks"
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".md").write_text("\n".join([*rows, "", str(report.facts), ""]))
        found = {name: {"measured": measured[name] / 1e3, "predicted": seconds} for name, seconds in predicted.items()}
        stem.with_suffix(".json").write_text(json.dumps({"steps": found, "facts": report.facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
