"""Disks that are really full or cannot be written: what is saved stays, and saving goes on when there is space again."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from bigvision import checkpoint
from bigvision.errors import UserError
from bigvision.runtime import gather_json, start
from tests.checkpoint.disks import read_tree
from tests.checkpoint.states import Save, find_version, save_version
from tests.checkpoint.test_disk_errors import FIRST, SCALE, leftovers, try_to_save
from tests.distributed import run_ranks


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own, in memory."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill_up_on_ranks(out: Path, free: list[int]) -> list[str]:
    """Save with only so many bytes left on the disk; returns what was wrong."""
    warnings.simplefilter("ignore")
    wrong: list[str] = []
    with start("cpu") as runtime:
        rank, ranks = runtime.rank, runtime.world_size
        if runtime.is_main:
            checkpoint.prepare_folder(out)
        save_version(out, FIRST, rank, ranks, scale=SCALE)
        before = read_tree(out / "step-00000001")
        ballast = out.with_name("ballast")
        outcomes = set()
        for left in free:
            if runtime.is_main:
                disk = os.statvfs(out)
                with ballast.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - left)
            dist.barrier()
            said = gather_json(try_to_save(out, Save(2, 2), rank, ranks))
            what = f"with {left} bytes left: "
            if len(set(said)) > 1 or not re.match(r"saved$|RankFailure: rank \d: OSError: \[Errno 28\] No space left", said[0]):
                wrong.append(f"{what}the ranks said {said}")
            outcomes.add(said[0] == "saved")
            names = leftovers(out) + ([] if said[0] == "saved" else [s for s in checkpoint.steps_in(out) if s != 1])
            if names or read_tree(out / "step-00000001") != before:
                wrong.append(f"{what}left over: {names}")
            if find_version(out, print) != (2 if said[0] == "saved" else 1):
                wrong.append(f"{what}another version is found")
            dist.barrier()
            if runtime.is_main:
                ballast.unlink()
                shutil.rmtree(out / "step-00000002", ignore_errors=True)
            dist.barrier()
        save_version(out, Save(2, 2), rank, ranks, scale=SCALE)
        if find_version(out, print) != 2 or outcomes != {False, True}:
            wrong.append(f"with the disk empty again: version {find_version(out, print)}, {outcomes}")
    return wrong


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        free = [0, 4 << 10, 8 << 10, 64 << 10, 500 << 10, *range(680 << 10, 760 << 10, 4 << 10)]
        assert run_ranks(fill_up_on_ranks, 2, disk / "out", free)[0] == []


def test_no_inode_left_loses_nothing(tmp_path: Path) -> None:
    outcomes = set()
    for inodes in range(10, 26):
        with small_disk(tmp_path / f"disk-{inodes}", f"size=4m,nr_inodes={inodes}") as disk:
            said = run_ranks(save_two_on_rank, 2, disk / "out")
            assert len(set(said)) == 1 and re.match(r"saved$|RankFailure: rank 0: OSError: \[Errno 28\]", said[0]), said
            steps = [2, 1] if said[0] == "saved" else [1]
            assert (leftovers(disk / "out"), checkpoint.steps_in(disk / "out")) == ([], steps)
            outcomes.add(said[0] == "saved")
    assert outcomes == {False, True}


def save_two_on_rank(out: Path) -> str:
    warnings.simplefilter("ignore")
    with start("cpu") as runtime:
        if runtime.is_main:
            checkpoint.prepare_folder(out)
        save_version(out, FIRST, runtime.rank, runtime.world_size)
        return try_to_save(out, Save(2, 2), runtime.rank, runtime.world_size)


def read_only_on_rank(out: Path, saves: bool) -> str:
    with start("cpu") as runtime:
        assert find_version(out, print) == 1
        said = try_to_save(out, Save(2, 2), runtime.rank, runtime.world_size)
        assert find_version(out, print) == (2 if saves else 1)
        return said


def save_first_on_rank(out: Path) -> None:
    with start("cpu") as runtime:
        if runtime.is_main:
            checkpoint.prepare_folder(out)
        save_version(out, FIRST, runtime.rank, runtime.world_size, scale=SCALE)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=8m") as disk:
        out = disk / "out"
        run_ranks(save_first_on_rank, 2, out)
        before = read_tree(out)
        remount(disk, "ro")
        said = run_ranks(read_only_on_rank, 2, out, False)
        assert said == [said[0]] * 2 and re.match(r"RankFailure: rank 0: OSError: \[Errno 30\] Read-only", said[0]), said
        for prepare in (checkpoint.prepare_folder, checkpoint.Lock):
            for folder in (out, disk / "new"):
                with pytest.raises(UserError, match=rf"out: {folder} cannot be written \(Read-only file system\)"):
                    prepare(folder)
        assert read_tree(out) == before
        remount(disk, "rw")
        assert run_ranks(read_only_on_rank, 2, out, True) == ["saved"] * 2
