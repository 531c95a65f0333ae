"""Collectives run beside the passes: read from traces of two ranks, with and without what lets them.

gloo's collectives run on threads of its own, but ``fully_shard`` waits on the CPU for each that it starts. On CUDA it starts
gathers in a stream of their own and goes on: here they are started asynchronously instead, and waited for where CUDA would. Its
reductions still hold up the CPU, so of these the trace shows only when they begin.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler import record_function
from torch.distributed.fsdp import FSDPModule

from bigvision.config import load_config
from bigvision.data import Batch
from bigvision.engine import engine as engines
from bigvision.engine.step import NativeStep
from bigvision.monitor.trace import Event, read_events, summarise
from bigvision.runtime import start
from bigvision.training.build import build_model
from tests.distributed import run_ranks

BLOCKS = 4
STEPS = 3


def traced(strategy: str, overlapping: bool) -> dict[str, Any]:
    """A trace of some steps of a small ViT on this rank; *overlapping* as the engine does it, or with that switched off."""
    model = {"name": "vit_tiny_patch16_224", "image_size": 32, "options": {"patch_size": 4, "depth": BLOCKS}}
    config = load_config(
        {
            "model": model,
            "train": {"global_batch": 16},
            "parallel": {"strategy": strategy, "precision": "fp32"} | ({"unit_size": "block"} if strategy == "fsdp" else {}),
        }
    )
    off = mock.patch.object(engines, "overlap", lambda *_: None)
    with start("cpu") as runtime:
        with off if not overlapping else mock.MagicMock():
            engine, _, _ = build_model(config, 10, runtime, steps=9, say=lambda text: None)
        if strategy == "fsdp":
            assert isinstance(engine.module, FSDPModule) and isinstance(engine.stepper, NativeStep)
            engine.module._set_unshard_async_op(True)
            if not overlapping:
                for module in engine.module.modules():
                    if isinstance(module, FSDPModule):
                        module.set_modules_to_forward_prefetch([])
                        module.set_modules_to_backward_prefetch([module])  # of none torch would take the next one itself
        labels = torch.arange(8)
        batch = Batch(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), labels, labels, labels >= 0)
        engine.train_step(batch)  # DDP arranges its buckets, FSDP learns the order of its units
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for step in range(STEPS):
                with record_function(f"step {step}"):
                    engine.train_step(batch)
        with tempfile.TemporaryDirectory() as folder:
            profile.export_chrome_trace(str(Path(folder, "trace.json")))
            return json.loads(Path(folder, "trace.json").read_text())


def begins(events: list[Event], name: str) -> list[int]:
    return [event.begin for event in events if event.name == name]


def gathered_ahead(events: list[Event]) -> int:
    """How many gathers of a block begin before the block that runs before it has ended, in both passes of all steps."""
    found = 0
    for block in range(BLOCKS):
        # Each block is gathered twice in a step; the last one's forward weights are freed and gathered again, too.
        gathers = begins(events, f"FSDP::all_gather (blocks.{block})")
        assert len(gathers) == 2 * STEPS
        before = begins(events, f"FSDP::post_forward (blocks.{block - 1})")
        after = begins(events, f"FSDP::post_backward_accumulate (blocks.{block + 1})")
        found += sum(begin < end for begin, end in zip(gathers[::2], before))
        found += sum(begin < end for begin, end in zip(gathers[1::2], after))
    return found


def reduced_on_the_way(events: list[Event]) -> int:
    """How many reductions of a block's gradients begin before the backward pass of the block before it has ended."""
    found = 0
    for block in range(1, BLOCKS):
        reductions = begins(events, f"FSDP::post_backward_reduce (blocks.{block})")
        ends = begins(events, f"FSDP::post_backward_accumulate (blocks.{block - 1})")
        found += sum(begin < end for begin, end in zip(reductions, ends, strict=True))
    return found


def averaged_within_backward(events: list[Event]) -> int:
    """How many all-reduces begin before a backward pass has ended."""
    passes = [event for event in events if event.name == "backward"]
    reductions = begins(events, "gloo:all_reduce")
    return sum(any(one.begin < begin < one.end for one in passes) for begin in reductions)


def hidden(trace: dict[str, Any]) -> float:
    """The share of all communication beside which something computes."""
    found = summarise(trace)
    assert found is not None
    return found["hidden"] / (found["hidden"] + found["categories"]["communication"])


def looked_at(strategy: str) -> dict[str, tuple[float, float]]:
    """What the trace of this rank shows, with overlap and without."""
    found: dict[str, list[float]] = {"gathers": [], "reductions": [], "averages": [], "hidden": []}
    for overlapping in (True, False):
        trace = traced(strategy, overlapping)
        events = read_events(trace)
        if strategy == "fsdp":
            found["gathers"].append(gathered_ahead(events))
            found["reductions"].append(reduced_on_the_way(events))
        else:
            found["averages"].append(averaged_within_backward(events))
        found["hidden"].append(hidden(trace))
    return {name: (values[0], values[1]) for name, values in found.items() if values}


def test_blocks_are_gathered_while_others_run() -> None:
    for found in run_ranks(looked_at, 2, "fsdp"):
        print(found)
        # All but the first of a forward pass, and but the last of a backward pass, which the model's head asks for.
        assert found["gathers"] == (2 * (BLOCKS - 1) * STEPS, 0)
        assert found["reductions"][0] == (BLOCKS - 1) * STEPS, "each unit's gradients travel when they are there"
        assert found["hidden"][0] > found["hidden"][1], found


def test_gradients_travel_while_the_backward_pass_goes_on() -> None:
    for found in run_ranks(looked_at, 2, "ddp"):
        print(found)
        buckets, none = found["averages"]
        assert buckets >= STEPS and none == 0, found
        assert found["hidden"][0] > found["hidden"][1], found
