"""Named ranges of a step, which a profiler's trace shows. Nothing is marked unless a profiler of torch's is recording."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch.autograd import profiler

NOTHING = nullcontext()
WAIT, FORWARD, BACKWARD = "wait for data", "forward", "backward"
GRAPH = "forward and backward"
"""Both as one CUDA graph."""
REDUCE, OPTIMIZER, EMA = "reduce", "optimizer", "ema"
"""What ranks still have to exchange of gradients after the passes, with their norm; the update; the average of the weights."""
RANGES = frozenset((WAIT, FORWARD, BACKWARD, GRAPH, REDUCE, OPTIMIZER, EMA))


def mark(name: str) -> AbstractContextManager[object]:
    """Surrounds what a trace shows as *name*, one of `RANGES`."""
    return profiler.record_function(name) if profiler._is_profiler_enabled else NOTHING
