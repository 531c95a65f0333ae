"""Ranks killed at every call of a save and at random moments: the next start always takes a whole checkpoint."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from bigvision import checkpoint
from bigvision.checkpoint.commit import Writer
from bigvision.runtime import all_or_none, start
from tests.checkpoint.states import Save, find_version, meet, save_version
from tests.checkpoint.system_calls import Call, intercept, write_part
from tests.checkpoint.test_power_loss import PERMANENT
from tests.distributed import run_ranks, start_ranks
from tests.recipes import digests, losses, recipe, run

FIRST = Save(1, 1)
SAVES = (Save(2, 2, 1), Save(2, 3, 1))
"""Another step, which prunes the first, and the same step again."""
SCALE = 32
"""Tensors of 150 kB, which are written past the page cache."""
DEADLINE = 120
"""Seconds in which survivors have to end; generous, for the machine may be busy."""


class Counting:
    """A handler that counts this rank's calls and gives one of them to *strike*."""

    def __init__(self, number: int = -1, strike: Callable[[Call], None] | None = None) -> None:
        self.number = number
        self.strike = strike
        self.count = 0
        self.names: list[str] = []
        self.lock = threading.Lock()

    def __call__(self, call: Call, perform: Callable[[], Any]) -> Any:
        with self.lock:
            self.count += 1
            self.names.append(call.name)
            chosen = self.count == self.number
        if chosen and self.strike:
            self.strike(call)
        # A killed process loses nothing that the system has; waiting for the disk would be most of the time.
        return None if call.name == "fsync" else perform()


def calls_on_rank(out: Path) -> list[str]:
    """What this rank calls in the saves of a test."""
    with start("cpu") as runtime:
        counting = Counting()
        with intercept(out, counting):
            for save in SAVES:
                save_version(out, save, runtime.rank, runtime.world_size, scale=SCALE)
        return counting.names


def die_on_rank(out: Path, notes: Path, victim: int, number: int, everyone: bool, torn: bool) -> None:
    with meet(notes / "store") as runtime:
        (notes / f"pid-{runtime.rank}").write_text(str(os.getpid()))
        dist.barrier()

        def strike(call: Call) -> None:
            if torn and call.name == "write":
                write_part(call, len(call.data) // 2)
            pids = [int((notes / f"pid-{rank}").read_text()) for rank in range(runtime.world_size)]
            for pid in pids if everyone else []:
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

        counting = Counting(number if runtime.rank == victim else -1, strike)
        try:
            with intercept(out, counting):
                for save in SAVES:
                    save_version(out, save, runtime.rank, runtime.world_size, scale=SCALE)
                    if runtime.is_main:
                        note(notes, save.version)
        except Exception:
            sys.exit(3)


def note(notes: Path, version: int) -> None:
    """Write down that a version was saved."""
    with (notes / "saved").open("a") as file:
        file.write(f"{version}\n")


def noted(notes: Path) -> list[int]:
    """The versions that were saved."""
    path = notes / "saved"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(processes: list[BaseProcess]) -> list[int | None]:
    """The exit codes of processes of which some were killed; the others have to notice and end."""
    deadline = time.monotonic() + DEADLINE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    assert None not in codes, f"a rank did not end within {DEADLINE} s of another's death: {codes}"
    return codes


def start_again(out: Path, allowed: set[int]) -> int:
    """What the next start does in *out*; returns the version that it takes, one of *allowed*."""
    said = list[str]()
    checkpoint.Lock(out).release()
    checkpoint.prepare_folder(out)
    strange = [path.name for path in out.iterdir() if not re.fullmatch(PERMANENT, path.name)]
    version = find_version(out, said.append)
    assert version in allowed and not said, f"version {version}, not one of {allowed}; {said}"
    for step in checkpoint.steps_in(out):
        find_version(out.with_name("none"), said.append, str(out / checkpoint.folder_name(step)))
    assert not strange, f"left over: {strange}"
    return version


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("before") / "out"
    with start("cpu"):
        checkpoint.prepare_folder(folder)
        save_version(folder, FIRST, scale=SCALE)
    return folder


@pytest.fixture(scope="module")
def calls(before: Path) -> list[list[str]]:
    """Each rank's calls."""
    out = before.with_name("counted")
    shutil.copytree(before, out)
    return run_ranks(calls_on_rank, 2, out)


def die_at(folder: Path, before: Path, victim: int, number: int, everyone: bool, torn: bool) -> list[int | None]:
    """Kill ranks at one call and start again; returns how the ranks ended."""
    out, notes = folder / "out", folder / "notes"
    shutil.copytree(before, out)
    notes.mkdir()
    codes = ended(start_ranks(die_on_rank, 2, out, notes, victim, number, everyone, torn))
    assert codes[victim] == -signal.SIGKILL or codes == [0, 0], codes
    versions = [save.version for save in (FIRST, *SAVES)]
    saved = len(noted(notes))
    with start("cpu"):
        start_again(out, set(versions[saved : saved + 2]))
        save_version(out, Save(9, 9), scale=SCALE)
        start_again(out, {9})
    shutil.rmtree(folder)
    return codes


def moments(calls: list[list[str]], some: int | None) -> Iterator[tuple[int, int, bool, bool]]:
    """(victim, call, whether all die, whether half of a write arrives); all of them, or all renames and *some* others."""
    every = [
        (victim, number, everyone, torn)
        for victim, names in enumerate(calls)
        for number, name in enumerate(names, start=1)
        for everyone in (False, True)
        for torn in ((False, True) if name == "write" else (False,))
    ]
    if some is None:
        yield from every
        return
    # A rename is where it is decided which state counts; between two of them the older one is under neither name.
    rng, renames = random.Random(2), [m for m in every if calls[m[0]][m[1] - 1] == "rename" and m[2]]
    yield from renames + rng.sample([m for m in every if m[0] == 1 and not m[2]], 1) + rng.sample(every, some - 1)


@pytest.mark.parametrize("some", [3, pytest.param(None, marks=pytest.mark.long)])
def test_a_rank_that_dies_at_any_call_leaves_a_whole_checkpoint(
    tmp_path: Path, before: Path, calls: list[list[str]], some: int | None
) -> None:
    assert {"open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"} <= set(calls[0]) and "write" in calls[1]
    died, wrong = 0, []
    for number, moment in enumerate(moments(calls, some)):
        try:
            died += -signal.SIGKILL in die_at(tmp_path / str(number), before, *moment)
        except Exception as error:
            victim, call, everyone, torn = moment
            what = f"call {call} of rank {victim} ({calls[victim][call - 1]}, {everyone=}, {torn=})"
            wrong.append(f"{what}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} of {number + 1}:\n" + "\n".join(wrong[:20])
    assert died > 0.9 * (number + 1)


def save_forever(out: Path, notes: Path, waits: bool, writer: Writer) -> None:
    """Start as a run does, and save a version after the other until killed."""
    try:
        with meet(notes / "store") as runtime, mock.patch.object(os, "fsync", os.fsync if waits else lambda _: None):
            all_or_none(lambda: checkpoint.prepare_folder(out) if runtime.is_main else None)
            version = find_version(out, print) or 0
            while True:
                version += 1
                save_version(out, Save(version // 2, version, 2), runtime.rank, runtime.world_size, "flat", 6000, 1, writer)
                if runtime.is_main:
                    note(notes, version)
    except Exception:
        sys.exit(3)


@pytest.mark.parametrize("kills", [6, pytest.param(200, marks=pytest.mark.long)])
def test_kills_at_random_moments_lose_nothing_saved(tmp_path: Path, kills: int) -> None:
    """One rank or all of three; each step is saved twice, so that half of the saves replace a checkpoint."""
    rng, out = random.Random(kills), tmp_path / "out"
    newest = 0
    for number in range(kills):
        (notes := tmp_path / f"notes-{number}").mkdir()
        processes = start_ranks(save_forever, 3, out, notes, rng.random() < 0.5, rng.choice(("direct", "direct", "owner")))
        deadline = time.monotonic() + DEADLINE
        while not noted(notes) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.random() * rng.choice((0.02, 0.2)))
        for process in processes if rng.random() < 0.5 else [rng.choice(processes)]:
            os.kill(process.pid or 0, signal.SIGKILL)
        codes = ended(processes)
        assert -signal.SIGKILL in codes and 0 not in codes, codes
        saved = noted(notes)
        assert saved and saved[0] in (newest, newest + 1), "the children found another state than the one after the last kill"
        with start("cpu"):
            newest = start_again(out, {saved[-1], saved[-1] + 1})


def train_on_rank(plain: dict[str, Any], store: Path) -> None:
    with meet(store):
        run(plain)


@pytest.mark.long  # a run that is killed in a save, where time is short, is in tests/training/test_kills.py
@pytest.mark.parametrize("kills", [1, 6])
def test_training_killed_while_it_saves_goes_on_bit_for_bit(tmp_path: Path, kills: int) -> None:
    """A checkpoint per step, so that most of the time is saving; one rank or all are killed."""
    rng = random.Random(kills)

    def plain(out: Path, every: int) -> dict[str, Any]:
        return recipe(
            out, parallel={"strategy": "fsdp"}, train={"steps": 4 + 3 * kills}, checkpoint={"every": every, "keep": 2}
        )

    run_ranks(run, 3, plain(tmp_path / "whole", 1000))
    out = tmp_path / "killed"
    for kill in range(kills):
        processes = start_ranks(train_on_rank, 3, plain(out, 1), tmp_path / f"store-{kill}")
        deadline = time.monotonic() + DEADLINE
        while len(checkpoint.steps_in(out)) < 2 or checkpoint.steps_in(out)[0] < 3 * kill + 2:
            assert time.monotonic() < deadline, "no steps are made"
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        for process in processes if rng.random() < 0.5 else [rng.choice(processes)]:
            os.kill(process.pid or 0, signal.SIGKILL)
        ended(processes)
    run_ranks(run, 3, plain(out, 1))
    assert losses(out) == losses(tmp_path / "whole")
    last = checkpoint.folder_name(4 + 3 * kills)
    assert digests(out / last) == digests(tmp_path / "whole" / last)
