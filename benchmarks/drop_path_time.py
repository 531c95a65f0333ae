"""What stochastic depth costs: branches that run on the kept samples only, over branches that are masked.

A training step of a ViT-S at 64 pixels on one rank. Bounds: with a rate of 0.4 in all blocks at most 0.72 of mask mode, and of
the step that a plain loop takes with timm's own modules; with rates that rise to 0.4 at most 0.88 of the step without
stochastic depth. Run it with ``make bench``; it writes ``benchmarks/results/drop_path_time_DEVICE.{json,md}``, and ends with
code 1 where a bound is passed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import Tensor

from benchmarks.harness import Side, compare
from benchmarks.peers import Work, batch, hand_written
from bigvision import load_config
from bigvision.data import Batch
from bigvision.models.drop_path import set_constant_rate
from bigvision.runtime import Runtime, start
from bigvision.training.build import build_model

RESULTS = Path(__file__).parent / "results"
MASK, SKIP, TIMM = "mask, constant", "skip, constant", "timm in a plain loop, constant"
NONE, RISING, RISING_MASK = "no drop path", "skip, linear", "mask, linear"
BOUNDS = {(SKIP, MASK): 0.72, (SKIP, TIMM): 0.72, (RISING, NONE): 0.88}


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    with start(asked.device) as runtime:
        images, labels = (part.to(runtime.device) for part in batch(asked.batch, image_size=asked.image_size))
        sides = {
            MASK: ours(asked, runtime, images, labels, asked.rate, "mask", "constant"),
            SKIP: ours(asked, runtime, images, labels, asked.rate, "skip", "constant"),
            TIMM: by_hand(asked, runtime, images, labels),
            NONE: ours(asked, runtime, images, labels, 0.0),
            RISING: ours(asked, runtime, images, labels, asked.rate, "skip", "linear"),
            RISING_MASK: ours(asked, runtime, images, labels, asked.rate, "mask", "linear"),
        }
        how = "compiled" if asked.compile else "eager"
        question = (
            f"A step with drop path {asked.rate}: {asked.model} at {asked.image_size} px, batch {asked.batch}, "
            f"{asked.precision}, {how}"
        )
        report = compare(question, sides, MASK, rounds=asked.rounds, calls=1, warmup=3, device=runtime.device)
        print(report.table())
        report.write(asked.results / f"drop_path_time_{asked.device}")
    passed = False
    for (one, other), bound in BOUNDS.items():
        ratio = ratio_of(report.times[one], report.times[other])
        print(f"{one} over {other}: {ratio:.3f} (bound {bound})")
        passed |= ratio > bound
    if passed:
        print("error: a bound is passed", file=sys.stderr)
    return int(passed)


def ratio_of(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over the rounds."""
    return median(one / other for one, other in zip(times, others, strict=True))


def ours(
    asked: argparse.Namespace, runtime: Runtime, images: Tensor, labels: Tensor, rate: float, mode: str = "mask",
    schedule: str = "linear",
) -> Side:  # fmt: skip
    """One call of ``engine.train_step``."""
    work = Work(precision=asked.precision)
    model: dict[str, Any] = {"name": asked.model, "image_size": asked.image_size, "drop_path": rate}
    config = load_config(
        {
            "model": {**model, "drop_path_mode": mode, "drop_path_schedule": schedule},
            "optim": {"lr": work.lr, "weight_decay": work.weight_decay, "clip": work.clip, "warmup": work.warmup},
            "parallel": {
                "strategy": "ddp", "precision": asked.precision, "device": asked.device, "compile": asked.compile,
            },
            "train": {"global_batch": asked.batch},
        }
    )  # fmt: skip
    engine, _, _ = build_model(config, 10, runtime, steps=work.steps, say=print)
    every = torch.ones_like(labels, dtype=torch.bool)
    return lambda: engine.train_step(Batch(images, labels, labels, every))


def by_hand(asked: argparse.Namespace, runtime: Runtime, images: Tensor, labels: Tensor) -> Side:
    """The same step in plain PyTorch with timm's model as it is."""
    torch.manual_seed(0)
    model = timm.create_model(asked.model, img_size=asked.image_size, num_classes=10, drop_path_rate=asked.rate).train()
    set_constant_rate(model, asked.rate, asked.model)
    blocks = model.get_submodule("blocks").children() if asked.compile else ()
    step = hand_written(model, Work(precision=asked.precision), runtime.device, blocks)
    return lambda: step(images, labels)


if __name__ == "__main__":
    sys.exit(main())
