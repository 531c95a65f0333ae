"""How many images a second does the loader make, beside its peers' loaders and beside no loader at all?

The sides take turns (see `benchmarks.harness`), each with as many workers, on the same folder of photos in the page cache, to
batches of normalised float32 on the CPU. PyTorch has one thread in this process, as `DataLoader` gives it in each worker. A
turn is timed from the arrival of one batch to that of another, after what the workers had made in advance is used up, and the
next side begins when the workers are idle.

What limits every loader is what the same processes reach that only read, decode, crop and resize ("no loader"). Two of
bigvision's sides are held against it: "bigvision" as all peers are measured, with the device's arithmetic, which here takes its
time from the workers' two cores; and "bigvision, uint8 batches", which is the loader's own part.

Run it with ``make bench``; it writes ``benchmarks/results/data_time_cpu.{json,md}``.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import active_children
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import data_sides
from benchmarks.checkpoint_report import Target
from benchmarks.harness import Line, machine, summarize, turn
from benchmarks.photos import write_photos
from bigvision.data import Stream, open_source, train_batches, transform
from bigvision.data.order import Part

RESULTS = Path(__file__).parent / "results"
OWN, CEILING, REDUCED, BYTES = "bigvision", "no loader", "bigvision, reduce", "bigvision, uint8 batches"
PEERS = ("torchvision", "torchvision, v2 on tensors", "timm", "timm, prefetcher")
SAMPLES, PLACES = 10**9, 256
STEPS = (64, 4096)
"""Global batches, of micro-batches of 64, whose first micro-batch is waited for."""


@dataclass(frozen=True)
class Report:
    title: str
    times: dict[str, list[float]]
    """Seconds of a turn, per side and round."""
    images: int
    """Of a turn."""
    position: list[float]
    """Seconds to find a batch's samples in the middle of an epoch."""
    first: dict[int, list[float]]
    """Seconds from no workers to the first micro-batch, by global batch."""
    shared: float
    """MB that the loader of the larger one shares with its workers."""
    facts: dict[str, Any]

    def lines(self) -> list[Line]:
        """Each side's times over bigvision's."""
        return [summarize(name, times, self.times[OWN]) for name, times in self.times.items()]

    def targets(self) -> list[Target]:
        """What was to be reached, and was it."""
        lines = {line.name: line for line in self.lines()}
        found = [
            Target(f"images/s: bigvision over {name}", lines[name].ratio, lines[name].interval, 1.5, False) for name in PEERS
        ]
        ceiling = lines[CEILING]
        found.append(Target(f"images/s: {OWN} over {CEILING}", ceiling.ratio, ceiling.interval, 0.85, False))
        ceiling = summarize(CEILING, self.times[CEILING], self.times[BYTES])
        found.append(Target(f"images/s: {BYTES} over {CEILING}", ceiling.ratio, ceiling.interval, 0.85, False))
        what = f"finding {PLACES} samples in the middle of an epoch of {SAMPLES:,}"
        found.append(Target(what, median(self.position) * 1e3, None, 50, True, " ms"))
        small, large = (median(self.first[step]) for step in STEPS)
        found.append(
            Target(f"time to the first micro-batch: batch {STEPS[1]:,} over {STEPS[0]}", large / small, None, 1.5, True)
        )
        return [*found, Target(f"shared memory of batch {STEPS[1]:,}", self.shared, None, 400, True, " MB")]

    def table(self) -> str:
        """The report as Markdown."""
        rows = [f"## {self.title}", "", "| target | found | 95 % interval | wanted | met |", "|---|---:|---:|---:|---|"]
        rows += [target.row() for target in self.targets()]
        rows += ["", "| side | images/s (quartiles) | bigvision over it | 95 % interval |", "|---|---:|---:|---:|"]
        for line in self.lines():
            speed, low, high = (self.images / ms * 1e3 for ms in (line.milliseconds, *line.quartiles[::-1]))
            row = f"| {line.name} | {speed:.0f} ({low:.0f} to {high:.0f}) |"
            between = f"{line.interval[0]:.3f} to {line.interval[1]:.3f}"
            rows.append(f"{row} 1 | |" if line.name == OWN else f"{row} {line.ratio:.3f} | {between} |")
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        return "\n".join([*rows, "", f"{len(self.times[OWN])} rounds of {self.images} images; {facts}.", ""])

    def write(self, stem: Path) -> None:
        """Write ``stem.json`` and ``stem.md``."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        targets = [asdict(target) | {"met": target.met} for target in self.targets()]
        found = {"targets": targets, "lines": [asdict(line) for line in self.lines()]} | asdict(self)
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        stem.with_suffix(".md").write_text(self.table())


def main() -> None:
    """Measure, print the table and write it."""
    asked = options().parse_args()
    torch.set_num_threads(1)
    report = measure(asked)
    print(report.table())
    report.write(asked.results / ("data_time_cpu" if asked.workers == 2 else f"data_time_cpu_{asked.workers}_workers"))


def options() -> argparse.ArgumentParser:
    """What the measurement can be asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--interpolation", default="bilinear", choices=("bilinear", "bicubic"))
    parser.add_argument("--photos", type=int, default=400)
    parser.add_argument("--batches", type=int, default=8, help="timed, of a turn; a multiple of the workers")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def measure(asked: argparse.Namespace) -> Report:
    """Write the photos, start every side's workers and let the sides take turns."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        root = Path(folder)
        write_photos(root, asked.photos)
        sizes = [file.stat().st_size for file in root.glob("*/*.jpg")]
        common = (root, asked.image_size, asked.batch, asked.workers, asked.interpolation)
        sides = {
            OWN: data_sides.bigvision(*common),
            f"{OWN} (again)": data_sides.bigvision(*common),
            REDUCED: data_sides.bigvision(*common, reduce=True),
            BYTES: data_sides.bigvision(*common, arithmetic=False),
            PEERS[0]: data_sides.torchvision(*common),
            PEERS[1]: data_sides.torchvision(*common, tensors=True),
            PEERS[2]: data_sides.timm(*common),
            PEERS[3]: data_sides.timm(*common, prefetcher=True),
            CEILING: data_sides.ceiling(*common),
        }
        runs = {name: stack.enter_context(side) for name, side in sides.items()}
        times = race(runs, asked.rounds, asked.batches, 3 * asked.workers or 1)
        stack.pop_all().close()
        first: dict[int, list[float]] = {step: [] for step in STEPS}
        for number in range(3):
            for step in STEPS if number % 2 else STEPS[::-1]:
                seconds, shared = begin(root, asked.image_size, asked.workers, step)
                first[step].append(seconds)
    title = (
        f"Photos to batches of {asked.batch} at {asked.image_size} px, {asked.interpolation}, {asked.workers} workers, "
        f"files of {min(sizes) // 1000} to {max(sizes) // 1000} kB"
    )
    facts = machine(torch.device("cpu"))
    del facts["ranks"]
    return Report(title, times, asked.batches * asked.batch, [find(number) for number in range(20)], first, shared, facts)


def race(runs: Mapping[str, data_sides.Run], rounds: int, batches: int, lead: int) -> dict[str, list[float]]:
    """Seconds of each side for *batches* batches, in each round.

    Args:
        lead: batches of a turn before those that are timed. Workers have made two each in advance; after a third the
            timing begins when a batch arrives.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-1, rounds):
        for name in turn(list(runs), max(number, 0)):
            wait_until_idle()
            runs[name](lead)
            start = time.perf_counter()
            runs[name](batches)
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    return times


def begin(root: Path, size: int, workers: int, step: int) -> tuple[float, float]:
    """Seconds until the first micro-batch of 64 of a global batch of *step* is there, and MB of shared memory."""
    source = open_source(f"imagefolder:{root}", "train", shared=False)
    options: Any = {"seed": 0, "position": 0, "rank": 0, "ranks": 1, "workers": workers, "micro_batch": 64}
    began = time.perf_counter()
    with train_batches(source, transform("photo", size, train=True), global_batch=step, **options) as batches:
        next(batches)
        return time.perf_counter() - began, batches.shared_bytes / 1e6


def wait_until_idle(limit: float = 30.0) -> None:
    """Wait until the workers have made what they make in advance."""
    before, deadline = -1, time.monotonic() + limit
    while (now := _ticks()) != before and time.monotonic() < deadline:
        before = now
        time.sleep(0.05)


def _ticks() -> int:
    """Processor time of this process's children, in ticks of the clock (10 ms)."""
    found = 0
    for child in active_children():
        stat = Path(f"/proc/{child.pid}/stat")
        found += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) if stat.exists() else 0
    return found


def find(number: int) -> float:
    """Seconds to find a batch's samples in the middle of an epoch, from nothing."""
    start = random.Random(number).randrange(SAMPLES)
    begin = time.perf_counter()
    assert len(Stream(number, [Part(0, SAMPLES, SAMPLES)]).places(start, start + PLACES)) == PLACES
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
