"""Files that cannot be read, or only by some ranks: nothing is taken for damaged, and nothing valid is replaced or removed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from bigvision import checkpoint, disk
from bigvision.checkpoint import ReadError, Saver, commit, manifest, retention
from bigvision.checkpoint import writer as writing
from bigvision.checkpoint.commands import run_checkpoint
from bigvision.runtime import RankFailure, gather_json, start
from tests.checkpoint.disks import read_tree
from tests.checkpoint.states import Save, find_version, save_version
from tests.distributed import run_ranks

OLDER, NEWEST = Save(1, 1), Save(2, 2)
TENSORS, PROGRESS = "step-00000002/model.safetensors", "step-00000002/progress.json"


class Failing:
    """System calls of this process that fail or give less, on some file."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch, self.count = monkeypatch, 0
        monkeypatch.setattr(manifest, "PAUSES", (0.0, 0.0, 0.0))

    def calls(self, names: tuple[str, ...], path: Path, number: int, times: int) -> None:
        """Fail the first *times* of the calls *names* on *path* with errno *number*."""
        for name in names:
            self.patch.setattr(os, name, self._failing(getattr(os, name), path, number, times))

    def _failing(self, real: Callable[..., Any], path: Path, number: int, times: int) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **more: Any) -> Any:
            name = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
            if name == str(path) and self.count < times:
                self.count += 1
                raise OSError(number, os.strerror(number))
            return real(target, *arguments, **more)

        return call

    def reads_are_short(self) -> None:
        pread, preadv = os.pread, os.preadv
        self.patch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 100), offset))
        self.patch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:1000]], offset))


def make(out: Path) -> None:
    with start("cpu") as runtime:
        for save in (OLDER, NEWEST):
            save_version(out, save, runtime.rank, runtime.world_size, scale=8)


def restore(out: Path, victim: int, names: tuple[str, ...], file: str, number: int, times: int) -> tuple[str, list[str]]:
    """Restore on every rank while one cannot read; what came of it, and what was logged."""
    said: list[str] = []
    with start("cpu") as runtime, pytest.MonkeyPatch.context() as patch:
        failing = Failing(patch)
        if runtime.rank == victim:
            failing.calls(names, out / file, number, times)
        failing.reads_are_short()
        try:
            return f"version {find_version(out, said.append)}", said
        except Exception as error:
            return f"{type(error).__name__}: {error}", said


LASTING = 1000


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_a_rank_cannot_read_is_not_damaged(tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    run_ranks(make, 2, out)
    before = read_tree(out)
    for names, file in ((("preadv",), TENSORS), (("open",), TENSORS), (("open", "pread"), PROGRESS), (("lstat",), TENSORS)):
        found = run_ranks(restore, 2, out, 1, names, file, number, 3)
        assert found == [("version 2", [])] * 2, "an error that passes is waited for"
        found = run_ranks(restore, 2, out, 1, names, file, number, LASTING)
        name = errno.errorcode[number]
        assert all(
            re.match(rf"RankFailure: rank 1: ReadError: {out / file} cannot be read \({name}, errno {number}: ", text)
            for text, _ in found
        ), found
        assert [said for _, said in found] == [[], []] and found[0][0] == found[1][0]
    assert read_tree(out) == before


def see_otherwise(out: Path, how: str) -> tuple[str, list[str]]:
    """Restore while rank 1 alone sees a file missing, cut or with other bytes."""
    said: list[str] = []
    with start("cpu") as runtime, pytest.MonkeyPatch.context() as patch:
        failing = Failing(patch)
        if runtime.rank == 1 and how == "missing":
            failing.calls(("lstat",), out / TENSORS, errno.ENOENT, LASTING)
        elif runtime.rank == 1:
            checksum = manifest.checksum
            patch.setattr(manifest, "checksum", lambda data: checksum(data) ^ (len(data) > 20_000))
        try:
            return f"version {find_version(out, said.append)}", said
        except Exception as error:
            return f"{type(error).__name__}: {error}", said


def test_damage_is_what_all_ranks_find(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_ranks(make, 2, out)
    before = read_tree(out)
    for how, what in (("missing", "model.safetensors is missing"), ("bytes", "differs from its checksum")):
        found = run_ranks(see_otherwise, 2, out, how)
        assert all(text.startswith("RankFailure: rank 1: ") and what in text for text, _ in found), found
        assert all("rank 0 finds it as it was written" in text and said == [] for text, said in found)
    assert read_tree(out) == before


# A single rank.


def test_pruning_removes_nothing_where_something_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with start("cpu"):
        for save in (OLDER, NEWEST):
            save_version(tmp_path, save)
        failing = Failing(monkeypatch)
        failing.calls(("open",), tmp_path / "step-00000001" / "progress.json", errno.EIO, LASTING)
        with pytest.warns(UserWarning, match="is saved, but clearing up after it failed: .*EIO"):
            save_version(tmp_path, Save(3, 3, keep=1))
        assert checkpoint.steps_in(tmp_path) == [3, 2, 1]
        with pytest.raises(ReadError):
            retention.best_value(tmp_path, "top1", 3)
        assert run_checkpoint(["prune", str(tmp_path), "--keep", "1"]) == 0
        assert checkpoint.steps_in(tmp_path) == [3, 1], "it is neither counted nor removed"
        assert run_checkpoint(["verify", str(tmp_path)]) == 1 and run_checkpoint(["list", str(tmp_path)]) == 0
        said = capsys.readouterr().out
        assert "left as it is" in said and "cannot be read (EIO, errno 5" in said and "unreadable" in said


@pytest.mark.parametrize("verify", ["sample", "full", "none"])
def test_what_was_written_is_read_back_before_older_ones_go(
    tmp_path: Path, verify: commit.Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = writing.write_chunks

    def badly(folder: Path, chunks: Any) -> Any:
        ranges = real(folder, chunks)
        for name in {part.file for part in ranges if part.file.startswith("model")}:
            path = folder / name
            data = bytearray(path.read_bytes())
            data[-8] ^= 1
            path.write_bytes(data)
        return ranges

    with start("cpu"):
        save_version(tmp_path, OLDER)
        before = read_tree(tmp_path)
        monkeypatch.setattr(commit, "write_chunks", badly)
        saver = Saver(tmp_path, 10**9, checkpoint.Retention(1), background=False, verify=verify)
        from tests.checkpoint.states import cut, tensors_of

        documents = {"config.json": {}, "progress.json": {"step": 2, "version": 2, "scale": 1}}
        if verify == "none":
            saver.save(2, cut(0, 1, "rows", tensors_of(2)), documents)
            assert checkpoint.steps_in(tmp_path) == [2]
            return
        with pytest.raises(RankFailure, match=r"what was just written cannot be read back: .* differs"):
            saver.save(2, cut(0, 1, "rows", tensors_of(2)), documents)
        assert read_tree(tmp_path) == before


def test_a_manifest_that_does_not_cover_its_files_is_never_written() -> None:
    with pytest.raises(ValueError, match="do not add up"):  # also under python -O
        manifest.build({"a": 3}, [manifest.ByteRange("a", 0, 2, 0)])


def test_direct_writing_that_another_thread_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread finds that the file takes no direct I/O while another is about to write."""
    (tmp_path / "file").touch()
    file = writing.OpenFile(tmp_path / "file")
    file.direct = file.descriptors[0] if file.direct is None else file.direct
    real, data = os.pwrite, writing.aligned(1 << 16)

    def pwrite(descriptor: int, some: Any, offset: int) -> int:
        file.direct = None
        return real(file.descriptors[0], some[:4096], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert file._write_direct(memoryview(data.numpy()), 0) == 1 << 16
    file.close()


@pytest.mark.parametrize(
    ("kind", "name", "writer"),
    [(0x6969, "NFS", "owner"), (0x65735546, "FUSE", "owner"), (0x0BD00BD0, "Lustre", "direct"), (0xEF53, "", "direct")],
)
def test_the_writer_suits_the_file_system(
    tmp_path: Path, kind: int, name: str, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert disk._kind(tmp_path) > 0 and disk._kind(tmp_path / "missing") == 0
    monkeypatch.setattr(disk, "_kind", lambda folder: kind if folder.exists() else 0)
    said: list[str] = []
    with start("cpu"):
        saver = Saver(tmp_path / "missing" / "out", 10**9, checkpoint.Retention(1), say=said.append)
        assert saver.writer == writer
        assert said == ([f"out: {tmp_path / 'missing' / 'out'} is on {name}: checkpoint.writer is {writer}"] if name else [])
        assert Saver(tmp_path, 10**9, checkpoint.Retention(1), writer="direct", say=said.append).writer == "direct"


def look_for_token(folder: Path, shared: bool) -> str:
    with start("cpu") as runtime:
        out = folder / ("0" if shared else str(runtime.rank))
        out.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        try:
            commit.LOOKS = 2
            commit.check_shared(out)
            said = "shared"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        return "; ".join([*{*gather_json(said)}, *os.listdir(out)])


def test_a_folder_that_the_hosts_do_not_share_is_noticed_at_start(tmp_path: Path) -> None:
    assert run_ranks(look_for_token, 2, tmp_path / "a", True) == ["shared"] * 2
    said = run_ranks(look_for_token, 2, tmp_path / "b", False)
    assert said[0] == said[1] and re.match(rf"UserError: out: {tmp_path / 'b' / '1'} of rank 1 on host .* --out$", said[0])
