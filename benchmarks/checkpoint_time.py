"""How long do saving and loading a training state take, beside the peers and beside what disk and memory can do?

One state of AdamW under ``fsdp``, random in every number, is saved by bigvision and by each peer in turn, in an order that
is balanced over the rounds. A side's turn: an empty folder and nothing left for the disk to do; its save; `fsync` of all its
files, which costs nothing where it did that itself (both times are kept); its files dropped from the page cache; its load; its
files removed. How each peer is used, and why so, is said in ``checkpoint_sides.py`` and ``checkpoint_torch.py``. Before the
timed rounds each side has one in which its load must bring back the numbers that were saved, and in which memory is watched. In
bigvision's turns its files are also read raw: each rank a part of them, in order, into one buffer.

The cache that is dropped is this machine's: where the disk is a virtual one its host may keep another, for all sides alike. The
kernel counts the bytes (``/proc/self/io``), so they show whether a load really came from the disk.

Run it with ``make bench``; it writes ``benchmarks/results/checkpoint_time_cpu_N_ranks.{json,md}``. At its full size it needs
about 16 GB of memory and 8 GB of disk for two ranks.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoint_report import Measured, Report, Stall
from benchmarks.checkpoint_sides import GROUPS, PEERS, fill
from benchmarks.checkpoint_torch import Side, held
from benchmarks.harness import machine, turn
from benchmarks.peers import Work
from benchmarks.resources import Act, Cost, cost, everywhere, make_cold, make_durable, make_empty, size_of
from benchmarks.step_time import RESULTS, configuration
from bigvision import checkpoint
from bigvision.checkpoint.commit import commit
from bigvision.checkpoint.writer import plan
from bigvision.config import Config, parse_size
from bigvision.engine import Engine
from bigvision.runtime import Runtime, from_main, start
from bigvision.training.build import build_model

BUFFER = 16 << 20
"""Bytes that a raw read takes at a time."""


def main() -> None:
    """Measure, print the tables and write them."""
    asked = options().parse_args()
    with start("cpu") as runtime:
        measure(asked, runtime)


def options() -> argparse.ArgumentParser:
    """What the measurement can be asked for."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", default="vit_large_patch16_224")
    parser.add_argument("--options", default="{}")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--out", type=Path, default=Path("checkpoints"), help="a folder on the disk that is measured")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.set_defaults(image_size=None, batch=1, precision="fp32", device="cpu")
    return parser


def measure(asked: argparse.Namespace, runtime: Runtime) -> None:
    """Build the state, race the groups of sides, and report."""
    config = configuration(asked, Work(), runtime.world_size, "fsdp")
    engine, _, card = build_model(config, 10, runtime, steps=1, say=lambda text: None)
    assert isinstance(engine, Engine)
    fill(held(engine))
    own = bigvision(config, engine, card)
    whole = {(part.group, part.name): part.numel * part.values.element_size() for part in engine.fragments()}
    out = asked.out / from_main(f"checkpoint_time-{os.getpid()}")
    groups: list[dict[str, Measured]] = []
    try:
        stalled = stall(config, engine, card, out, asked.rounds)
        for group in GROUPS:
            with group(asked, runtime, engine) as others:
                # Its own reads are of use without any peer.
                if others or not groups:
                    groups.append(race([own, *others], out, asked.rounds))
    finally:
        if runtime.is_main:
            shutil.rmtree(out, ignore_errors=True)
        engine.close()
    ranks = f"{runtime.world_size} rank{'s' * (runtime.world_size > 1)}"
    title = f"Saving and loading {asked.model} {asked.options} with AdamW, fp32, {ranks}"
    report = Report(title, sum(whole.values()), groups, stalled, asked.rounds, machine(runtime.device))
    if runtime.is_main:
        print(report.table())
        report.write(asked.results / f"checkpoint_time_cpu_{ranks.replace(' ', '_')}")


def race(sides: list[Side], out: Path, rounds: int) -> dict[str, Measured]:
    """Let *sides* take turns; the first is bigvision's."""
    found = {}
    for side in sides:
        costs, size = once(side, out, watched=True)
        found[side.name] = Measured(size, costs, {act: [] for act in costs})
    for number in range(rounds):
        for place in turn([str(place) for place in range(len(sides))], number):
            side = sides[int(place)]
            for act, spent in once(side, out)[0].items():
                found[side.name].costs[act].append(spent)
    return found


def once(side: Side, out: Path, watched: bool = False) -> tuple[dict[str, Cost], int]:
    """One save of *side* and its loads: what each cost, by name, and the bytes of all files.

    Args:
        watched: watch the memory, and check that each load brings back what was saved.
    """
    make_empty(out)
    before = sums(side.tensors()) if watched else []
    costs = {"save": cost(lambda: side.save(out), lambda: make_durable(out), watched)}
    size = size_of(out)
    for name, act in (*side.loads.items(), *side.reads.items()):
        if watched and name in side.loads:
            for tensor in side.tensors():
                tensor.detach().zero_()
        make_cold(out)
        costs[name] = cost(partial(act, out), watched=watched)
        assert not watched or sums(side.tensors()) == before, f"{name} did not bring back what was saved"
    make_empty(out)
    return costs, size


def stall(config: Config, engine: Engine, card: dict[str, Any], out: Path, rounds: int) -> Stall:
    """How long a background save keeps the training waiting, against a copy in memory of what the rank holds.

    Both copy into memory that was in use before; the first save, which is watched, has to get it.
    """
    saver = checkpoint.Saver(out, shard_size(config), checkpoint.Retention(config.checkpoint.keep), say=print)
    values = held(engine)

    def save(watched: bool = False) -> Cost:
        make_empty(out)
        begin = partial(saver.save, engine.step, engine.fragments(), documents(config, engine, card))
        return cost(begin, saver.wait, watched)

    first = save(watched=True)
    copies = [value.clone() for value in values]

    def copy() -> None:
        for to, value in zip(copies, values):
            to.copy_(value)

    saves, alone = [], []
    for number in range(rounds):
        for side in turn("sc", number):
            if side == "s":
                saves.append(save())
            else:
                alone.append(cost(copy))
    saver.close()
    make_empty(out)
    return Stall(everywhere(sum(value.nbytes for value in values)), first, saves, alone)


def bigvision(config: Config, engine: Engine, card: dict[str, Any]) -> Side:
    """What a run does when it saves, here without a background, and when it resumes."""

    def save(folder: Path) -> None:
        given = documents(config, engine, card)
        content = plan(list(engine.fragments()), shard_size(config))
        commit(folder, engine.step, content, given, checkpoint.Retention(config.checkpoint.keep))

    def load(full: bool) -> Act:
        def resume(folder: Path) -> None:
            found = checkpoint.find("auto", folder, full, print)
            assert found is not None
            found = found.restore_or_older(list(engine.fragments()), print)
            engine.restored(found.progress["scalars"])

        return resume

    return Side(
        "bigvision",
        save,
        lambda: held(engine),
        {"bigvision": load(True), "bigvision, not verified": load(False)},
        {"raw read": partial(read, False), "raw read, direct": partial(read, True)},
    )


def documents(config: Config, engine: Engine, card: dict[str, Any]) -> dict[str, Any]:
    """The JSON files of a run's checkpoint."""
    progress = {
        "step": engine.step, "samples": engine.samples, "scalars": engine.scalars(), "metrics": {}, "config": config.to_dict(),
    }  # fmt: skip
    return {"config.json": card, "progress.json": progress}


def shard_size(config: Config) -> int:
    """Largest size of a file's data in bytes."""
    return parse_size(config.checkpoint.shard_size, "checkpoint.shard_size")


def read(direct: bool, folder: Path) -> None:
    """Read all files in *folder*, each rank a part of each, in order.

    Args:
        direct: past the page cache.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # Direct reads begin at whole blocks, also in memory.
    block = mmap.PAGESIZE
    with mmap.mmap(-1, BUFFER) as memory, memoryview(memory) as buffer:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            size = path.stat().st_size
            share = -(-size // ranks // block) * block
            position, end = rank * share, min((rank + 1) * share, size)
            descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
            try:
                while position < end:
                    wanted = min(BUFFER, -(-(end - position) // block) * block)
                    with buffer[:wanted] as part:
                        position += os.preadv(descriptor, [part], position)
            finally:
                os.close(descriptor)


def sums(tensors: list[Tensor]) -> list[int]:
    """A checksum of each tensor."""
    return [zlib.crc32(memoryview(tensor.reshape(-1).view(torch.uint8).numpy())) for tensor in tensors]  # pyright: ignore


if __name__ == "__main__":
    main()
