"""What saving and loading cost: seconds, bytes through the system, memory. And files brought to the disk or out of memory."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

Act = Callable[[Path], object]
"""Does one thing with a folder. Every rank calls it."""


@dataclass(frozen=True)
class Cost:
    seconds: float
    """Of the slowest rank."""
    durable: float
    """Seconds until the files would also have outlived a power cut."""
    passed: int
    """Bytes that the ranks gave to write calls (``wchar``)."""
    stored: int
    """Bytes that the ranks caused to be written to a disk (``write_bytes``)."""
    fetched: int
    """Bytes that the ranks caused to be read from a disk (``read_bytes``)."""
    memory: int | None
    """Bytes by which the anonymous memory of a rank grew at most; None where it was not watched."""


def cost(work: Callable[[], object], finish: Callable[[], object] | None = None, watched: bool = False) -> Cost:
    """Do *work* on all ranks at once, then *finish*, which makes it durable.

    Args:
        watched: watch the memory; not for a time to rely on.
    """
    memory = Resident() if watched else None
    before = _counters()
    dist.barrier()
    begin = time.perf_counter()
    work()
    seconds = durable = time.perf_counter() - begin
    if finish is not None:
        dist.barrier()
        finish()
        durable = time.perf_counter() - begin
    used = [after - first for after, first in zip(_counters(), before)]
    grown = memory.stop() if memory else 0
    slowest = torch.tensor([seconds, durable, float(grown)], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    total = torch.tensor(used)
    dist.all_reduce(total)
    passed, stored, fetched = total.tolist()
    return Cost(float(slowest[0]), float(slowest[1]), passed, stored, fetched, int(slowest[2]) if watched else None)


class Resident:
    """Watches this process's anonymous memory from now on."""

    def __init__(self) -> None:
        # What was freed and is still held would hide as much growth.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        program = [sys.executable, "-I", str(Path(__file__).with_name("resident.py")), str(os.getpid())]
        self.process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.first = int(self.process.stdout.readline())

    def stop(self) -> int:
        """The bytes by which the memory grew at most."""
        most, _ = self.process.communicate()
        return int(most) - self.first


def make_durable(folder: Path) -> None:
    """Bring all files in *folder*, and their names, to the disk; each rank takes some, the largest files first."""
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: (-path.stat().st_size, path))
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
    for path in (files + folders)[dist.get_rank() :: dist.get_world_size()]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_cold(folder: Path) -> None:
    """Drop the files in *folder* from the page cache; what is not yet on the disk would stay."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file())[dist.get_rank() :: dist.get_world_size()]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    dist.barrier()


def make_empty(folder: Path) -> None:
    """Make *folder*, or make it anew, with nothing left for the disk to do. Called on every rank."""
    dist.barrier()
    if dist.get_rank() == 0:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        os.sync()
    dist.barrier()


def size_of(folder: Path) -> int:
    """Bytes of all files in *folder*."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def everywhere(value: int) -> int:
    """The largest of the ranks' values."""
    largest = torch.tensor(value)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def _counters() -> list[int]:
    with open("/proc/self/io", encoding="ascii") as file:
        values = dict(line.split(": ") for line in file.read().splitlines())
    return [int(values[name]) for name in ("wchar", "write_bytes", "read_bytes")]
