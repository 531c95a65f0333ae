"""Several ranks, one on each device, over NCCL."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.jobs import job, start_process
from tests.cuda.runs import installed, plain
from tests.cuda.test_numbers import NEAR, difference, sections
from tests.distributed import free_port
from tests.recipes import lines, losses, recipe, run

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"strategy": "ddp"}),
    "fsdp": (2, {"strategy": "fsdp"}),
    "zero1": (2, {"strategy": "zero1"}),
    "zero2": (2, {"strategy": "zero2"}),
    "zero3": (2, {"strategy": "zero3"}),
    "pipeline": (2, {"strategy": "pipeline"}),
    "interleaved": (2, {"strategy": "pipeline", "schedule": "interleaved"}),
    "hybrid": (4, {"strategy": "fsdp", "replicas": 2}),
    "pipeline of shards": (4, {"strategy": "pipeline", "stages": 2}),
}
"""Name → (ranks, the section `parallel`)."""


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """torchrun's."""
    values = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Start a process for each rank."""
    port = free_port()
    return [start_process(function, *arguments, environment=environment(rank, ranks, port)) for rank in range(ranks)]


def twelve(**parallel: Any) -> dict[str, Any]:
    """Micro-batches that every number of stages and schedule takes."""
    made = sections(**parallel)
    pipelined = parallel.get("strategy") == "pipeline"
    return made | {"train": made["train"] | {"micro_batch": None if pipelined else 6}}


def several(folder: Path, name: str, precision: str) -> list[float] | str:
    ranks, parallel = LAYOUTS[name]
    processes = on_ranks(run, ranks, plain(folder / "out", **twelve(precision=precision, **parallel)))
    try:
        for process in processes:
            process.join(150)
        codes = [process.exitcode for process in processes]
        return losses(folder / "out") if codes == [0] * ranks else f"exit codes {codes}:\n{printed(folder)}"
    finally:
        for process in processes:
            process.kill()


def alone(folder: Path) -> list[float]:
    return run(recipe(folder / "out", **twelve()))


CASES = [
    pytest.param(
        name, precision,
        marks=[
            job(several, name, precision, seconds=45), pytest.mark.devices(ranks),
            pytest.mark.skipif(not installed(parallel["strategy"]), reason=f"{name} needs deepspeed"),
        ],
    )
    for name, (ranks, parallel) in LAYOUTS.items() for precision in ("fp32", "bf16")
]  # fmt: skip


@pytest.mark.parametrize(("name", "precision"), CASES)
@job(alone)
def test_several_ranks_have_the_losses_of_one(
    results: Callable[..., Any], figure: Callable[[str], None], name: str, precision: str
) -> None:
    apart = difference(results(several, name, precision), results(alone))
    figure(f"{name} {precision} on {LAYOUTS[name][0]} devices: losses differ from the CPU's by at most {apart:.1e}")
    assert apart < NEAR[precision]


def survivors(folder: Path, name: str) -> dict[str, Any]:
    """Kill rank 1 in the middle of a run; returns how long rank 0 lived on, its exit code and what it printed."""
    ranks, parallel = LAYOUTS[name]
    made = plain(folder / "out", **twelve(precision="bf16", **parallel))
    made["train"] |= {"steps": 100_000}
    made["checkpoint"] = {"every": 100_000}
    processes = on_ranks(run, ranks, made)
    try:
        path, until = folder / "out" / "metrics.jsonl", time.monotonic() + 120
        while not path.exists() or len(lines(folder / "out")) < 5:
            assert time.monotonic() < until and processes[0].exitcode is None, "no fifth step"
            time.sleep(0.1)
        os.kill(processes[1].pid, signal.SIGKILL)
        begin = time.monotonic()
        processes[0].join(60)
        return {"seconds": time.monotonic() - begin, "code": processes[0].exitcode, "printed": printed(folder)}
    finally:
        for process in processes:
            process.kill()


def printed(folder: Path) -> str:
    from tests.cuda.jobs import LOG

    return (folder / LOG).read_text()[-4000:]


GRACE, EXIT = 10.0, 15.0
"""Seconds: `limits.grace`, and what a process with a CUDA context may take to end."""


@pytest.mark.devices(2)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=job(survivors, name, seconds=60)) for name in ("ddp", "fsdp", "pipeline")]
)
def test_a_killed_rank_ends_the_others_in_time(results: Callable[..., Any], figure: Callable[[str], None], name: str) -> None:
    found = results(survivors, name)
    figure(f"{name}: a rank is killed, and the other ends after {found['seconds']:.1f} s")
    assert found["code"] not in (None, 0), found["printed"]
    assert found["seconds"] < GRACE + EXIT, found["printed"]
    assert "rank 1" in found["printed"]
