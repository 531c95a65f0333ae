"""What sharding adds to the host's time of an optimizer step: 400 sharded tensors over 400 plain ones, at most 1.2.

The tensors are so small that the host's time is all. A sharded step takes the local tensors of the parameters and of their
gradients, which a backward pass makes anew each time, and steps them; stepping DTensors themselves stands beside it. Run it
with ``make bench``; it writes ``benchmarks/results/optimizer_time_DEVICE.{json,md}``, and ends with code 1 where the bound is
passed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import AdamW

from benchmarks.harness import Side, compare
from bigvision.engine.state import local_tensor
from bigvision.runtime import Runtime, start

RESULTS = Path(__file__).parent / "results"
BOUND = 1.2
PLAIN, LOCAL, SHARDED = "plain tensors", "sharded, their local tensors", "sharded, as DTensors"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--elements", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    with start(asked.device) as runtime:
        sides = {
            PLAIN: plain(asked.tensors, asked.elements, runtime),
            LOCAL: local(asked.tensors, asked.elements, runtime),
            SHARDED: sharded(asked.tensors, asked.elements, runtime),
        }
        question = f"The host's time of an AdamW step over {asked.tensors} tensors of {asked.elements} elements"
        report = compare(question, sides, PLAIN, rounds=asked.rounds, calls=5, device=runtime.device)
        print(report.table())
        report.write(asked.results / f"optimizer_time_{asked.device}")
    ratio = next(line.ratio for line in report.lines if line.name == LOCAL)
    if ratio > BOUND:
        print(f"error: {LOCAL}: {ratio:.3f} times the time of {PLAIN}, more than {BOUND}", file=sys.stderr)
    return int(ratio > BOUND)


def values(count: int, elements: int, runtime: Runtime) -> list[Tensor]:
    return [torch.ones(elements, device=runtime.device) for _ in range(count)]


def step_of(parameters: Sequence[Tensor]) -> AdamW:
    """The optimizer, over what it steps."""
    return AdamW([nn.Parameter(value) for value in parameters], lr=1e-3, fused=True)


def plain(count: int, elements: int, runtime: Runtime) -> Side:
    """Plain parameters and gradients."""
    return as_they_are(values(count, elements, runtime), values(count, elements, runtime))


def local(count: int, elements: int, runtime: Runtime) -> Side:
    """Sharded parameters and gradients, whose local tensors are stepped under ``no_grad``."""
    whole, gradients = (
        scattered(values(count, elements, runtime), runtime),
        scattered(values(count, elements, runtime), runtime),
    )
    with torch.no_grad():
        optimizer = step_of([local_tensor(tensor) for tensor in whole])
    parameters = optimizer.param_groups[0]["params"]

    @torch.no_grad()
    def step() -> None:
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = local_tensor(gradient)
        optimizer.step()

    return step


def sharded(count: int, elements: int, runtime: Runtime) -> Side:
    """Sharded parameters and gradients, stepped as they are."""
    return as_they_are(*(scattered(values(count, elements, runtime), runtime) for _ in range(2)))


def as_they_are(tensors: Sequence[Tensor], gradients: Sequence[Tensor]) -> Side:
    optimizer = step_of(tensors)
    parameters = optimizer.param_groups[0]["params"]

    def step() -> None:
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient
        optimizer.step()

    return step


def scattered(tensors: Sequence[Tensor], runtime: Runtime) -> list[DTensor]:
    return [distribute_tensor(tensor, runtime.mesh["shard"], [Shard(0)]) for tensor in tensors]


if __name__ == "__main__":
    sys.exit(main())
