"""Saving in the background, by one run at a time, on file systems of every kind."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bigvision import checkpoint
from bigvision.checkpoint import Retention, Saver, commit, writer
from bigvision.checkpoint.writer import CHUNK
from bigvision.fragments import Fragment
from bigvision.runtime import RankFailure, gather_json, start
from tests.checkpoint.test_format import DOCUMENTS, load_on_rank, make_fragments, save_on_rank, whole_tensors
from tests.distributed import run_ranks
from tests.recipes import digests

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"

# In the background.


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def saver(out: Path, **options: Any) -> Saver:
    return Saver(out, 10**9, Retention(3), **options)


def change_while_saving(out: Path) -> list[str]:
    """What is saved is the state at the call, and two saves never run at once."""
    running: list[str] = []
    events: list[str] = []
    write = commit.write_chunks

    def slowly(*arguments: Any) -> Any:
        events.append("begin")
        assert not running
        running.append("one")
        time.sleep(0.3)
        try:
            return write(*arguments)
        finally:
            running.clear()
            events.append("end")

    with start("cpu") as runtime, patched(commit, "write_chunks", slowly):
        fragments = make_fragments(runtime.rank, runtime.world_size, "rows", whole_tensors())
        mine = saver(out)
        for step in (1, 2, 3):
            mine.save(step, fragments, dict(DOCUMENTS))
            events.append("on")
            for fragment in fragments:
                fragment.values.fill_(-step)
            dist.barrier()
            if step == 1:
                mine.wait()
                for fragment, whole in zip(fragments, make_fragments(runtime.rank, 2, "rows", whole_tensors())):
                    fragment.values.copy_(whole.values)
        mine.close()
    return events


def test_training_goes_on_and_the_state_of_the_call_is_saved(tmp_path: Path) -> None:
    for events in run_ranks(change_while_saving, 2, tmp_path):
        assert events.index("on") < events.index("end") and events.count("end") == 3
    assert checkpoint.steps_in(tmp_path) == [3, 2, 1]
    run_ranks(save_on_rank, 1, tmp_path / "same", "whole", 10**9)
    assert digests(tmp_path / "step-00000001") == digests(tmp_path / "same" / "step-00000003")
    assert digests(tmp_path / "step-00000002") == digests(tmp_path / "step-00000001")
    assert digests(tmp_path / "step-00000003") != digests(tmp_path / "step-00000001")


def fail_in_background(out: Path, bad_rank: int) -> tuple[str, float]:
    with start("cpu") as runtime:
        fragments = make_fragments(runtime.rank, runtime.world_size, "rows", whole_tensors())
        mine = saver(out)
        write = os.pwrite

        def full(descriptor: int, data: Any, offset: int) -> int:
            if threading.current_thread().name.startswith("checkpoint") and runtime.rank == bad_rank:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(descriptor, data, offset)

        with patched(os, "pwrite", full):
            mine.save(4, fragments, dict(DOCUMENTS))
            begin, steps = time.monotonic(), 0
            try:
                while time.monotonic() < begin + 60:
                    if any(gather_json(mine.failed)):
                        mine.raise_failure()
                    steps += 1
            except RankFailure as error:
                said = str(error)
            else:
                said = "nothing"
        assert (said, steps) == tuple(_everywhere((said, steps))), "all at the same step"
        # The run may go on to save again.
        mine.save(5, fragments, dict(DOCUMENTS))
        mine.wait()
        mine.close()
        return said, time.monotonic() - begin


def _everywhere(value: tuple[str, int]) -> list[Any]:
    from bigvision.runtime import from_main

    return from_main(list(value))


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_an_error_in_the_background_is_every_ranks_at_the_same_step(tmp_path: Path, bad_rank: int) -> None:
    run_ranks(save_on_rank, 3, tmp_path, "rows", 10**9)
    before = digests(tmp_path / "step-00000003")
    for said, seconds in run_ranks(fail_in_background, 3, tmp_path, bad_rank):
        assert said.startswith(f"rank {bad_rank}: OSError") and "No space left" in said and seconds < 30
    assert checkpoint.steps_in(tmp_path) == [5, 3] and digests(tmp_path / "step-00000003") == before
    assert not list(tmp_path.glob("*.tmp-*"))


def one_rank_is_silent(out: Path) -> str:
    with start("cpu") as runtime:
        mine = saver(out, timeout=2.0)
        write = commit.write_chunks

        def late(*arguments: Any) -> Any:
            if runtime.rank == 1:
                time.sleep(5)
            return write(*arguments)

        with patched(commit, "write_chunks", late):
            try:
                mine.save(4, make_fragments(runtime.rank, 2, "rows", whole_tensors()), dict(DOCUMENTS))
                mine.wait()
            except RankFailure as error:
                return str(error)
        return "saved"


def test_ranks_do_not_wait_for_ever_for_one(tmp_path: Path) -> None:
    said = run_ranks(one_rank_is_silent, 2, tmp_path)
    assert all("does not answer" in words for words in said), said
    assert checkpoint.steps_in(tmp_path) == []


def one_rank_has_no_memory(out: Path) -> list[str]:
    said: list[str] = []

    def copy(*arguments: Any) -> Any:
        raise MemoryError("as much as there is")

    with start("cpu") as runtime:
        mine = saver(out, say=said.append)
        with patched(writer.Arena, "copy", copy if runtime.rank == 1 else writer.Arena.copy):
            mine.save(3, make_fragments(runtime.rank, runtime.world_size, "flat", whole_tensors()), dict(DOCUMENTS))
        mine.wait()
    return said


def test_without_memory_for_a_copy_a_rank_writes_before_it_goes_on(tmp_path: Path) -> None:
    first, second, third = run_ranks(one_rank_has_no_memory, 3, tmp_path)
    assert first == third == [] and "no memory" in second[0]
    assert all(run_ranks(load_on_rank, 2, tmp_path, "rows"))


def only_one_rank_failed() -> str:
    """As after a timeout that one rank alone ran into."""
    with start("cpu") as runtime:
        mine = saver(Path("/nowhere"))
        mine.raise_failure()  # nobody failed: nothing is raised
        if runtime.rank == 1:
            mine.saving = Future()
            mine.saving.set_exception(OSError("the disk is gone"))
        try:
            mine.raise_failure()
        except RankFailure as error:
            assert not mine.failed
            return str(error)
    return "nothing"


def test_the_failure_of_one_rank_is_raised_on_all() -> None:
    assert run_ranks(only_one_rank_failed, 3) == ["the disk is gone"] * 3


def chunk(number: int, offset: int, length: int) -> writer.Chunk:
    values = torch.arange(offset, offset + length, dtype=torch.int64).to(torch.uint8)
    return writer.Chunk(f"file-{number}", offset, (values[: length // 3], values[length // 3 :]))


def test_a_copy_uses_few_slabs_of_one_size_and_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, with ordinary memory in the place of pinned memory."""
    asked: list[tuple[int, bool]] = []
    empty = torch.empty

    def allocate(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        asked.append((size, pin_memory))
        return empty(size, dtype=dtype)

    monkeypatch.setattr(writer, "SLAB", 256 << 10)
    monkeypatch.setattr(writer, "MOST_PINNED", 3)
    monkeypatch.setattr(writer, "on_cuda", lambda chunks: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "empty", allocate)
    sizes = [100_000, 70, 65_536, 3, 65_537, 131_000, 1, 90_001, 131_072, 131_072, 5, 250_000, 64_000, 200_000]
    wanted = [chunk(number, 1000 * number + 7, size) for number, size in enumerate(sizes)]
    arena = writer.Arena()
    for _ in range(3):  # later copies change neither the bytes nor the slabs
        copied = arena.copy(wanted)
        for before, after in zip(wanted, copied, strict=True):
            assert (after.file, after.offset, after.length) == (before.file, before.offset, before.length)
            assert torch.equal(torch.cat(before.parts), after.parts[0])
            aligns = before.length >= writer.LEAST_ALIGNED
            assert not aligns or (after.parts[0].data_ptr() - after.offset) % writer.ALIGN == 0
    assert asked == [(256 << 10, True)] * 3 + [(256 << 10, False)] * (len(asked) - 3)
    assert len(asked) == len(arena.slabs) <= 2 * -(-sum(sizes) // (256 << 10))


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUDA error: an illegal memory access was encountered"])
def test_where_no_more_can_be_pinned_ordinary_memory_serves(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    plain = writer.slab

    def refuse(pinned: bool) -> torch.Tensor:
        if pinned:
            raise RuntimeError(words)
        return plain(pinned)

    monkeypatch.setattr(writer, "on_cuda", lambda chunks: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(writer, "slab", refuse)
    arena, wanted = writer.Arena(), [chunk(0, 5, 70_000)]
    if "out of memory" in words:
        assert torch.equal(arena.copy(wanted)[0].parts[0], torch.cat(wanted[0].parts)) and arena.most_pinned == 0
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            arena.copy(wanted)


# File systems.


def save_otherwise(out: Path, how: str, options: dict[str, Any]) -> list[str]:
    """Save, and return the safetensors files that this rank opened to write fragments."""
    opened: list[str] = []
    write, existing = os.pwrite, writer.open_existing

    def open_existing(path: Path, flags: int) -> int:
        opened.append(path.name)
        if how == "refuses" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return existing(path, flags)

    def pwrite(descriptor: int, data: Any, offset: int) -> int:
        if how == "short":
            return write(descriptor, data[: max(1, len(data) // 2 + 1)], offset)
        if how == "cannot" and os.path.exists(f"/proc/self/fd/{descriptor}"):
            import fcntl

            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(descriptor, data, offset)

    with start("cpu") as runtime:
        mine = saver(out, **options)
        size = 9 << 20 if how == "two slabs" else writer.SLAB
        with patched(writer, "open_existing", open_existing), patched(os, "pwrite", pwrite), patched(writer, "SLAB", size):
            mine.save(3, large_fragments(runtime.rank, runtime.world_size), dict(DOCUMENTS))
            mine.wait()
        assert how != "two slabs" or (mine.arena is not None and len(mine.arena.slabs) == 2)
    return sorted(set(opened))


def large_fragments(rank: int, ranks: int) -> list[Fragment]:
    """Larger than a cell of the grid, with odd ends, beside small ones."""
    found = []
    for group, suffix in (("model", ""), ("optimizer", "/exp_avg")):
        for name, size in (("a", 3_000_001), ("b", 17), ("c", 700_003), ("d", 1)):
            values = torch.arange(size, dtype=torch.float32)
            step = -(-size // ranks)
            begin, end = min(rank * step, size), min((rank + 1) * step, size)
            found.append(Fragment(group, name + suffix, (size,), begin, values[begin:end].clone(), (0, 1)))
    return found


WAYS: list[tuple[str, dict[str, Any]]] = [("as it is", {"background": False}), ("as it is", {"writer": "owner"})]
WAYS += [("two slabs", {}), ("refuses", {}), ("cannot", {}), ("short", {}), ("short", {"background": False})]


def test_the_bytes_are_the_same_whatever_the_file_system_can(tmp_path: Path) -> None:
    run_ranks(save_otherwise, 1, tmp_path / "reference", "as it is", {})
    expected = digests(tmp_path / "reference" / "step-00000003")
    for number, (how, options) in enumerate(WAYS):
        opened = run_ranks(save_otherwise, 3, tmp_path / str(number), how, options)
        assert digests(tmp_path / str(number) / "step-00000003") == expected, (how, options)
        if options.get("writer") == "owner":
            assert opened == [["model.safetensors"], ["optimizer.safetensors"], []], "each file is written by one rank"
        else:
            assert opened == [["model.safetensors", "optimizer.safetensors"]] * 3


def fail_at_owner(out: Path) -> str:
    with start("cpu") as runtime:
        mine = saver(out, writer="owner", background=False)
        write = os.pwrite

        def broken(descriptor: int, data: Any, offset: int) -> int:
            if runtime.rank == 1 and offset > 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return write(descriptor, data, offset)

        with patched(os, "pwrite", broken):
            try:
                mine.save(3, large_fragments(runtime.rank, runtime.world_size), dict(DOCUMENTS))
            except RankFailure as error:
                return str(error)
    return "saved"


def test_an_error_of_an_owner_is_every_ranks(tmp_path: Path) -> None:
    said = run_ranks(fail_at_owner, 3, tmp_path)
    assert len(set(said)) == 1 and said[0].startswith("rank 1: OSError: [Errno 5]"), said
    assert list(tmp_path.iterdir()) == []


def test_copies_are_written_once_and_the_work_is_shared() -> None:
    size = 10 * CHUNK + 12345
    total, written = 0, []
    for rank in range(3):
        fragments = [Fragment("model", name, (size,), 0, torch.empty(size, dtype=torch.uint8), (rank, 3)) for name in "ab"]
        found = writer.plan(fragments, 10**12).chunks
        assert all(chunk.length <= CHUNK for chunk in found)
        written += [(chunk.offset, chunk.length) for chunk in found]
        total += (mine := sum(chunk.length for chunk in found))
        assert abs(mine - 2 * size / 3) <= CHUNK
    position = min(written)[0]
    for offset, length in sorted(written):
        assert offset == position
        position += length
    assert total == 2 * size


@pytest.mark.parametrize("row", ["sharded", "replicated"])
def test_the_picture_shows_who_writes_which_bytes(row: str) -> None:
    mega, shapes = 1 << 20, {"blocks.0.weight": 12, "blocks.1.weight": 8, "head": 6}
    writers: dict[str, list[tuple[int, int, int]]] = {}
    for rank in range(2):
        fragments = []
        for name, size in shapes.items():
            begin, length, copy = (rank * size // 2, size // 2, (0, 1)) if row == "sharded" else (0, size, (rank, 2))
            values = torch.empty(length * mega, dtype=torch.uint8)
            fragments.append(Fragment("model", name, (size * mega,), begin * mega, values, copy))
        for one in writer.plan(fragments, 24 * mega).chunks:
            writers.setdefault(one.file, []).append((one.offset, one.offset + one.length, rank))
    line = next(text for text in str(writer.__doc__).splitlines() if text.strip().startswith(row))
    drawn = re.split(r"(?<=\|)  (?=\|)", line[line.index("|") : line.rindex("|") + 1])
    assert len(drawn) == 2 and line.strip() in PAGE.read_text(encoding="utf-8")
    for (_, chunks), part in zip(sorted(writers.items()), drawn):
        ranks = list(re.finditer(r"(?<=\|) *(\d) *(?=\|)", part))[1:]  # the first is the header's
        assert len(ranks) >= 1
        for found in ranks:
            middle = (found.start() + found.end()) / 2 * mega / 2  # a column is half a MiB
            assert [rank for begin, end, rank in chunks if begin <= middle < end] == [int(found[1])]


# What stays.


def test_the_newest_the_best_and_every_nth_checkpoint_are_kept() -> None:
    values = ((10, 0.5), (20, 0.9), (30, 0.9), (40, 0.7), (50, 0.6))
    saved = {step: {"metrics": {"top1": top1, "loss": 1 - top1}, "evaluated": step} for step, top1 in values}
    assert Retention(2).keeps(saved) == {50: "", 40: ""}
    assert Retention(1, best="top1").keeps(saved) == {50: "", 20: "the best top1"}
    assert Retention(1, best="loss").keeps(saved) == {50: "", 20: "the best loss"}
    assert set(Retention(1, every=20).keeps(saved)) == {20, 40, 50}
    assert set(Retention(1, best="top5").keeps(saved)) == {50}
    some = {10: float("nan"), 20: 3.0, 30: "low"}
    saved = {step: {"metrics": {"loss": loss}, "evaluated": step} for step, loss in some.items()}
    assert set(Retention(1, best="loss").keeps(saved)) == {20, 30}


def save_with_metrics(out: Path) -> None:
    with start("cpu") as runtime:
        mine = Saver(out, 10**9, Retention(1, best="top1", every=4))
        for step, top1 in enumerate((0.1, 0.8, 0.3, 0.2, 0.5, 0.4, 0.1), start=1):
            documents = {"config.json": {}, "progress.json": {"step": step, "metrics": {"top1": top1}}}
            mine.save(step, make_fragments(runtime.rank, runtime.world_size, "rows", whole_tensors()), documents)
        mine.wait()


def test_the_best_and_every_nth_are_kept(tmp_path: Path) -> None:
    run_ranks(save_with_metrics, 2, tmp_path)
    assert checkpoint.steps_in(tmp_path) == [7, 4, 2]
