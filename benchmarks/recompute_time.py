"""What `parallel.recompute` costs and saves: the time of a forward and backward pass, and the bytes that it allocates at most.

All kinds take turns on one model, its blocks compiled on CUDA and not on the CPU. Run it with ``python -m
benchmarks.recompute_time``; it writes ``benchmarks/results/recompute_time_DEVICE.{json,md}``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Side, compare
from bigvision.config import Config, load_config
from bigvision.engine.parallelize import wrap_blocks
from bigvision.engine.state import allocate
from bigvision.models import find_blocks
from bigvision.models.formats import COMPUTE_DTYPES, compute_in
from bigvision.runtime import start

RESULTS = Path(__file__).parent / "results"
KINDS = ("none", "selective", "budget:0.5", "budget:0.3", "blocks")


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    sides: dict[str, Side] = {}
    peaks: dict[str, int] = {}
    with start(asked.device) as runtime:
        for kind in KINDS:
            config = load_config({"parallel": {"recompute": kind, "precision": asked.precision}})
            sides[kind] = passes(asked.model, asked.batch, config, runtime.device)
            peaks[kind] = peak(sides[kind], runtime.device)
        question = f"Recompute of {asked.model}, {asked.batch} images, {asked.precision}: a forward and a backward pass"
        report = compare(question, sides, "none", rounds=asked.rounds, calls=1, device=runtime.device)
    report.facts["MiB at most, beside weights and gradients"] = {kind: round(most / 2**20) for kind, most in peaks.items()}
    print(report.table())
    report.write(asked.results / f"recompute_time_{asked.device}")
    return 0


def passes(name: str, batch: int, config: Config, device: torch.device) -> Side:
    with torch.device("meta"):
        model = timm.create_model(name).train()
    blocks = [block.module for block in find_blocks(model)]
    shape = resolve_model_data_config(model)["input_size"]
    dtype = COMPUTE_DTYPES[config.parallel.precision]
    if dtype != torch.float32:
        compute_in([model], blocks, dtype)
    wrap_blocks(blocks, config, device, model, shape)
    allocate(model, device)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
        parameter.grad = torch.zeros_like(parameter)
    images = torch.randn(batch, *shape, device=device)
    return lambda: model(images).float().sum().backward()


def peak(side: Side, device: torch.device) -> int:
    """The bytes that *side* allocates at most."""
    side()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        side()
    now = most = 0
    results: Any = found.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


if __name__ == "__main__":
    sys.exit(main())
