"""Disks that fail at any call: every rank says the same, nothing saved is lost, and saving goes on after."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bigvision import checkpoint
from bigvision.checkpoint.commit import Writer
from bigvision.runtime import gather_json, start
from tests.checkpoint.disks import read_tree
from tests.checkpoint.states import Save, find_version, save_version
from tests.checkpoint.system_calls import Call, intercept, write_part
from tests.checkpoint.test_power_loss import PERMANENT
from tests.distributed import run_ranks

FIRST = Save(1, 1)
CASES: dict[str, tuple[Save, Writer]] = {
    "another step": (Save(2, 2, 1), "direct"),
    "the same step": (Save(1, 2, 1), "direct"),
    "by owners": (Save(2, 2, 1), "owner"),
}
DEADLINE = 30
"""Seconds in which a save has to fail."""
SCALE = 32
"""Tensors of 150 kB, which are written past the page cache."""

# What each fault hits from the chosen call on.
ALLOCATING = {"open", "write", "truncate", "mkdir"}
CHANGING = ALLOCATING | {"rename", "unlink", "rmdir", "fsync"}


class Failing:
    """A handler that fails this rank's calls from the *number*-th on: one of them with EIO, or all that a fault hits."""

    def __init__(self, number: int, fault: int) -> None:
        self.number = number
        self.fault = fault
        self.count = 0
        self.lock = threading.Lock()

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        with self.lock:
            self.count += 1
            count = self.count
        hits = {
            errno.EIO: count == self.number and not (call.name == "close" and call.reads),
            errno.ENOSPC: count >= self.number and call.name in ALLOCATING and not call.reads,
            errno.EROFS: count >= self.number and call.name in CHANGING and not call.reads,
        }
        if hits[self.fault]:
            if call.name == "close":
                perform()  # as Linux does: the descriptor is gone whatever close returns
            raise OSError(self.fault, os.strerror(self.fault), call.path)
        return None if call.name == "fsync" else perform()


def try_to_save(out: Path, save: Save, rank: int, ranks: int, writer: Writer = "direct") -> str:
    """What a rank has to say of a save."""
    began = time.monotonic()
    try:
        save_version(out, save, rank, ranks, "rows", 200_000, SCALE, writer)
        said = "saved"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    took = time.monotonic() - began
    return said if took < DEADLINE else f"{said}, after {took:.0f} s"


def still_open(out: Path) -> list[str]:
    """What this process has open in *out*."""
    links = (os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir())
    return [os.path.relpath(link, out) for link in links if link.startswith(f"{out}{os.sep}")]


def leftovers(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if not re.fullmatch(PERMANENT, path.name))


def fail_on_ranks(folder: Path, case: str, victim: int, fault: int, stride: int) -> tuple[int, list[str]]:
    """Fail each call of one rank in turn; returns how many were tried, and what was wrong."""
    warnings.simplefilter("ignore")
    wrong: list[str] = []
    save, writer = CASES[case]
    with start("cpu") as runtime:
        rank, ranks, first = runtime.rank, runtime.world_size, folder / "first"
        if runtime.is_main:
            checkpoint.prepare_folder(first)
        save_version(first, FIRST, rank, ranks, scale=SCALE)
        before = read_tree(first / "step-00000001")
        number, tried = 1, 0
        while True:
            out = folder / f"out-{number}"
            if runtime.is_main:
                shutil.copytree(first, out)
            dist.barrier()
            failing = Failing(number, fault)
            with intercept(out, failing) if rank == victim else nullcontext():
                said = gather_json(try_to_save(out, save, rank, ranks, writer))
            leaked = gather_json(still_open(out))
            if number > gather_json(failing.count)[victim]:
                assert set(said) == {"saved"}, said
                return tried, wrong
            tried += 1
            what = f"{os.strerror(fault)} at call {number} of rank {victim}: "
            if any(leaked):
                wrong.append(f"{what}files left open: {leaked}")
            if len(set(said)) > 1 or not re.match(rf"saved$|RankFailure: rank {victim}: .*{os.strerror(fault)}", said[0]):
                wrong.append(f"{what}the ranks said {said}")
            if said[0] != "saved" and save.step != FIRST.step and read_tree(out / "step-00000001") != before:
                wrong.append(f"{what}the older checkpoint was touched")
            # What could not be removed is removed by the next start.
            if fault != errno.EROFS and said[0] != "saved" and (names := leftovers(out)):
                wrong.append(f"{what}left over: {names}")
            elif fault == errno.EROFS and runtime.is_main:
                checkpoint.prepare_folder(out)
            dist.barrier()
            wrong += [f"{what}{text}" for text in _next(out, rank, ranks, said[0] == "saved")]
            dist.barrier()
            if runtime.is_main:
                shutil.rmtree(out)
            number += stride


def _next(out: Path, rank: int, ranks: int, saved: bool) -> list[str]:
    """Whether the state after a fault is one of the two, and whether this process can save and another can start."""
    wrong, said = list[str](), list[str]()
    try:
        version = find_version(out, said.append)
        if version not in ({2} if saved else {1, 2}) or said:
            wrong.append(f"version {version} was found; {said}")
    except Exception as error:
        wrong.append(f"nothing is found: {error}")
    dist.barrier()
    again = gather_json(try_to_save(out, Save(3, 3), rank, ranks))
    if set(again) != {"saved"}:
        wrong.append(f"of the next save the ranks said {again}")
    if rank == 0:
        checkpoint.prepare_folder(out)
        wrong += [f"left over after the next start: {names}"] if (names := leftovers(out)) else []
    dist.barrier()
    if find_version(out, said.append) != 3:
        wrong.append("the next start does not find the next save")
    return wrong


FAULTS = (errno.EIO, errno.ENOSPC, errno.EROFS)
LONG = [pytest.param(case, fault, victim, 1, marks=pytest.mark.long) for case in CASES for fault in FAULTS for victim in (0, 1)]
SHORT = [("another step", errno.EIO, 1, 4), ("the same step", errno.ENOSPC, 0, 5), ("by owners", errno.EIO, 0, 5)]


@pytest.mark.parametrize(("case", "fault", "victim", "stride"), SHORT + LONG)
def test_an_error_at_any_call_of_a_rank_is_every_ranks(tmp_path: Path, case: str, fault: int, victim: int, stride: int) -> None:
    tried, wrong = run_ranks(fail_on_ranks, 2, tmp_path, case, victim, fault, stride, timeout=900)[0]
    assert tried > 3
    assert not wrong, f"{len(wrong)} faults in {tried} calls:\n" + "\n".join(wrong[:10])


class Short:
    """A handler in which the system takes only some of the bytes of a write."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.short = 0

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        if call.name == "write" and (written := write_part(call, self.rng.randint(1, len(call.data)))):
            self.short += written < len(call.data)
            return written
        return None if call.name == "fsync" else perform()


def write_short_on_rank(out: Path) -> int:
    with start("cpu") as runtime:
        if runtime.is_main:
            checkpoint.prepare_folder(out)
        dist.barrier()
        with intercept(out, short := Short(runtime.rank)):
            save_version(out, FIRST, runtime.rank, runtime.world_size, scale=SCALE)
        assert find_version(out, print) == 1
        return short.short


def test_the_system_may_take_less_than_it_is_given(tmp_path: Path) -> None:
    assert min(run_ranks(write_short_on_rank, 2, tmp_path / "out")) > 5
