"""What ``import bigvision`` adds to importing torch and timm, at most 0.15 s, and what its first use takes beside that.

Each round is a process of its own that imports one after the other and times each, so that all meet the same machine. Run it
with ``make bench``; it writes ``benchmarks/results/import_time_cpu.{json,md}``, and ends with code 1 where the bound is passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

import torch

from benchmarks.harness import machine

BOUND = 0.15
"""Seconds."""
PEERS, PACKAGE, TRAINING = "import torch, timm", "import bigvision", "bigvision.train, the first time"
PROGRAM = """
import json, time
times = [time.perf_counter()]
import torch, timm
times.append(time.perf_counter())
import bigvision
times.append(time.perf_counter())
bigvision.train
times.append(time.perf_counter())
print(json.dumps([end - begin for begin, end in zip(times, times[1:])]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=15, help="processes that are timed, after one that warms the disk's cache"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    rounds = [_once() for _ in range(asked.rounds + 1)][1:]
    times = {name: [taken[name] for taken in rounds] for name in (PEERS, PACKAGE, TRAINING)}
    facts = machine(torch.device("cpu"))
    written = table(times, facts)
    stem = asked.out / "import_time_cpu"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps({"times": times, "facts": facts}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(written)
    print(written)
    added = median(times[PACKAGE])
    if added > BOUND:
        print(f"error: {PACKAGE} adds {added:.3f} s, more than {BOUND} s", file=sys.stderr)
    return int(added > BOUND)


def table(times: dict[str, list[float]], facts: dict[str, object]) -> str:
    """The times as Markdown."""
    rows = ["## What does import bigvision add?", "", "| in this order | ms (quartiles) |", "|---|---:|"]
    for name, taken in times.items():
        low, _, high = quantiles(taken, n=4)
        rows.append(f"| {name} | {1e3 * median(taken):.1f} ({1e3 * low:.1f} to {1e3 * high:.1f}) |")
    of = ", ".join(f"{key} {value}" for key, value in facts.items())
    return "\n".join([*rows, "", f"{len(times[PEERS])} processes; {of}.", ""])


def _once() -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return dict(zip((PEERS, PACKAGE, TRAINING), json.loads(done.stdout)))


if __name__ == "__main__":
    sys.exit(main())
