"""The most that a step allocates, measured at the allocator by torch's profiler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile


def peak_of_step(plain: dict[str, Any], outputs: int = 10) -> dict[str, Any]:
    """Bytes that a rank of this run holds at most during a step, and what is predicted. Called on every rank."""
    from bigvision.config import load_config
    from bigvision.planning.memory import rank_memory
    from bigvision.planning.profile import profile as planned
    from bigvision.planning.state import Layout
    from bigvision.runtime import start
    from bigvision.training.build import build_model
    from tests.planning.held import batch_of, everything

    config = load_config(plain)
    with start("cpu", config.parallel.replicas, config.parallel.pipeline_ranks) as runtime:
        layout = Layout.of(config, runtime.world_size)
        memory = rank_memory(planned(config, outputs), config, layout, runtime.rank)
        if config.parallel.strategy.startswith("zero"):
            from bigvision.engine.zero import load_deepspeed

            load_deepspeed(runtime.device)
        before = everything()
        engine, plan, _ = build_model(config, outputs, runtime, 9, say=lambda text: None)
        batch = batch_of(plan, engine, config.train.global_batch // runtime.data_ranks)
        engine.train_step(batch)
        while engine.train_step(batch).skipped:  # until fp16's loss scale fits
            pass
        rest = everything() - before
        # The profiler does not see what gloo's threads free, which are the last to hold what is exchanged in some of the steps.
        least = min(_peak(engine, batch) for _ in range(4 if runtime.world_size > 1 else 1))
        engine.close()
        return {"rank": runtime.rank, "rest": rest, "step": least, "measured": rest + least, **vars(memory)}


def _peak(engine: Any, batch: Any) -> int:
    """The most that a step allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        engine.train_step(batch)
    results: Any = found.profiler.kineto_results  # type: ignore[union-attr]
    live: dict[int, int] = {}
    now = most = 0
    for event in sorted(_allocations(results.experimental_event_tree()), key=lambda event: event.start_time_ns):
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        # What lies at an address that is given out again was freed, unseen. What a step frees may be older than it.
        now += size - live.pop(address, 0) if size > 0 else -live.pop(address, -size)
        if size > 0:
            live[address] = size
        most = max(most, now)
    return most


def _allocations(events: Any) -> Iterator[Any]:
    """What is allocated and freed in *events*, and in those that they contain."""
    for event in events:
        if isinstance(event.extra_fields, _ExtraFields_Allocation):
            yield event
        yield from _allocations(event.children)


def difference(found: dict[str, Any]) -> float:
    """Of the predicted peak from the measured one, as a share."""
    return found["peak"] / found["measured"] - 1


torch.set_num_threads(1)
