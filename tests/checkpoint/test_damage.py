"""Bits flipped, files cut, swapped, missing or replaced by other things: all of it is noticed, named and passed over."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bigvision import checkpoint
from bigvision.errors import UserError
from bigvision.runtime import start
from tests.checkpoint.damaging import Victim
from tests.checkpoint.disks import read_tree
from tests.checkpoint.states import Save, find_version, save_version
from tests.distributed import run_ranks

LONG = pytest.param(True, marks=pytest.mark.long, id="long")


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """These tests are a single rank."""
    with start("cpu"):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], Victim]]:
    """Victims by their shard size."""
    folder = tmp_path_factory.mktemp("damage")
    made: dict[int, Victim] = {}
    yield lambda size: made.get(size) or made.setdefault(size, Victim(folder / str(size) / "out", size))


@pytest.fixture(params=[10**9, pytest.param(6000, marks=pytest.mark.long)], ids=["one file", "several"])
def victim(request: pytest.FixtureRequest, folders: Callable[[int], Victim]) -> Iterator[Victim]:
    victim = folders(request.param)
    yield victim
    victim.repair()
    victim.wrong, victim.tried = [], 0


def header_of(data: bytes) -> int:
    """Where the header of a safetensors file ends."""
    return 8 + int.from_bytes(data[:8], "little")


@pytest.mark.parametrize("every_bit", [False, LONG])
def test_every_byte_of_a_header(victim: Victim, every_bit: bool) -> None:
    rng = random.Random(1)
    for name in victim.tensors:
        text = victim.content[name][: header_of(victim.content[name])]
        # Of the spaces at its end a few stand for all, but for the long run.
        for position in (
            place for place in range(len(text)) if every_bit or place % 64 == 0 or text[place : place + 1] != b" "
        ):
            for bit in range(8) if every_bit else (rng.randrange(8),):
                victim.flip(name, position, bit)
                victim.expect_passed_over(f"{name}, byte {position}, bit {bit}", name)
        victim.repair()
    victim.assert_nothing_wrong(800)


@pytest.mark.parametrize("every_bit", [False, LONG])
def test_every_byte_of_the_manifest(victim: Victim, every_bit: bool) -> None:
    rng = random.Random(2)
    for position in range(len(victim.content["manifest.json"])):
        for bit in range(8) if every_bit else (rng.randrange(8),):
            victim.flip("manifest.json", position, bit)
            victim.expect_passed_over(f"manifest.json, byte {position}, bit {bit}", "manifest.json")
    victim.assert_nothing_wrong(300)


@pytest.mark.parametrize("count", [300, pytest.param(10000, marks=pytest.mark.long)])
def test_random_bits(victim: Victim, count: int) -> None:
    rng = random.Random(3)
    names = list(victim.content)
    for number in range(count):
        # As many in the small files as in the large ones.
        name = names[number % len(names)]
        position, bit = rng.randrange(len(victim.content[name])), rng.randrange(8)
        victim.flip(name, position, bit)
        victim.expect_passed_over(f"{name}, byte {position}, bit {bit}", name)
        victim.write(name, victim.content[name])
    victim.assert_nothing_wrong(count)


def test_files_that_are_cut_or_longer(victim: Victim) -> None:
    rng = random.Random(4)
    for name, data in victim.content.items():
        header = header_of(data) if name in victim.tensors else 20
        lengths = {*range(17), header - 1, header, header + 1, 512, 4096, len(data) - 1, *rng.sample(range(len(data)), 20)}
        for length in sorted(lengths):
            if length < len(data):
                victim.write(name, data[:length])
                victim.expect_passed_over(f"{name} cut to {length} bytes", name)
        for more in (b"\0", b" ", b"\n", b"0", data, bytes(4096)):
            victim.write(name, data + more)
            victim.expect_passed_over(f"{name} with {more[:8]} after it", name)
        victim.write(name, bytes(len(data)))
        victim.expect_passed_over(f"{name} of zeros", name)
        victim.write(name, data)
    victim.assert_nothing_wrong(150)


def test_files_that_are_missing_or_swapped(victim: Victim) -> None:
    for name in victim.content:
        (victim.newest / name).unlink()
        victim.expect_passed_over(f"{name} is missing", name)
        victim.repair()
        for other in victim.content:
            if other != name:
                victim.write(name, victim.content[other])
                victim.expect_passed_over(f"{name} is a copy of {other}", name)
                victim.write(other, victim.content[name])
                victim.expect_passed_over(f"{name} and {other} are swapped", name, other)
                victim.repair()
        # Whole, of the same size, and of another step.
        older = (victim.older / name).read_bytes()
        if older != victim.content[name]:
            victim.write(name, older)
            named = victim.content if name == "manifest.json" else [name]
            victim.expect_passed_over(f"{name} is the older one's", *named)
            victim.repair()
    for name in victim.content:
        (victim.newest / name).unlink()
    victim.expect_passed_over("all files are missing", "manifest.json")
    victim.assert_nothing_wrong(50)


def test_blocks_that_are_zeros_or_elsewhere(victim: Victim) -> None:
    """What disks do: a sector that was never written, or was written to another place."""
    rng = random.Random(5)
    for name in victim.tensors:
        data = victim.content[name]
        for begin in range(0, len(data) - 511, 512):
            victim.write(name, data[:begin] + bytes(512) + data[begin + 512 :])
            victim.expect_passed_over(f"{name}: sector {begin // 512} is lost", name)
            other = rng.randrange(0, len(data) - 511)
            if data[other : other + 512] != data[begin : begin + 512]:
                victim.write(name, data[:begin] + data[other : other + 512] + data[begin + 512 :])
                victim.expect_passed_over(f"{name}: bytes {other} are at {begin}", name)
        victim.write(name, data)
    victim.assert_nothing_wrong(60)


def put(path: Path, what: str, elsewhere: Path) -> None:
    """Put something that is no file of a checkpoint at *path*; links lead to *elsewhere*."""
    if what == "link":
        path.symlink_to(elsewhere)
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    else:
        path.write_text(what)


def test_other_things_in_the_place_of_files(victim: Victim, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, data in victim.content.items():
        (same := tmp_path / name).write_bytes(data)
        links = (
            same,
            victim.newest / "hidden",
            tmp_path / "nothing",
            Path("/dev/zero"),
            tmp_path / "pipe",
            victim.older / name,
        )
        for what, elsewhere in [
            *(("link", path) for path in links),
            *((w, same) for w in ("link to itself", "folder", "pipe", "socket")),
        ]:
            (victim.newest / "hidden").write_bytes(data)
            (victim.newest / name).unlink()
            put(victim.newest / name, what, elsewhere)
            victim.expect_passed_over(f"{name} is a {what} ({elsewhere})", name)
            victim.repair()
    victim.assert_nothing_wrong(40)


def test_links_that_come_after_the_check(victim: Victim, tmp_path: Path) -> None:
    """Somebody is faster than the reader: a file becomes a link to the same bytes just before it is opened."""
    really = os.open
    for name, data in victim.content.items():
        (outside := tmp_path / name).write_bytes(data)

        def late(path: Any, flags: int, *args: Any, name: str = name, outside: Path = outside, **kwargs: Any) -> int:
            if os.fspath(path) == str(victim.newest / name) and not os.path.islink(path):
                os.unlink(path)
                os.symlink(outside, path)
            return really(path, flags, *args, **kwargs)

        with mock.patch.object(os, "open", late):
            victim.expect_passed_over(f"{name} becomes a link", name)
        assert (victim.newest / name).is_symlink()
        victim.repair()
    victim.assert_nothing_wrong(5)


def test_a_link_in_the_place_of_a_new_file(tmp_path: Path) -> None:
    """Names of new files are drawn by chance; where one is guessed, it is not written through."""
    (precious := tmp_path / "precious").write_text("data")
    out = tmp_path / "out"
    checkpoint.prepare_folder(out)
    with mock.patch("secrets.token_hex", lambda count: "0" * 2 * count):
        (out / ".latest.00000000").symlink_to(precious)
        with pytest.warns(UserWarning, match="is saved, but clearing up after it failed"):
            save_version(out, Save(1, 1))
        (out / ".probe.00000000").symlink_to(precious)
        with pytest.raises(UserError, match="cannot be written"):
            checkpoint.prepare_folder(out)
    assert precious.read_text() == "data" and find_version(out, print) == 1


def test_leftovers_that_are_no_folders(tmp_path: Path) -> None:
    """A start removes what is in its folder and follows no link out of it."""
    (outside := tmp_path / "outside").mkdir()
    (outside / "precious").write_text("data")
    for name in ("step-00000004.tmp-0a0b0c0d", "step-00000004.pruned-0a0b0c0d", "step-00000001.aside-0a0b0c0d"):
        for number, (what, elsewhere) in enumerate(
            [("file", outside), ("link", outside), ("pipe", outside), ("link", Path("nothing"))]
        ):
            out = tmp_path / f"{name}-{number}"
            checkpoint.prepare_folder(out)
            save_version(out, Save(1, 1))
            put(out / name, what, elsewhere)
            checkpoint.prepare_folder(out)
            assert sorted(path.name for path in out.glob("step*")) == ["step-00000001"]
            assert find_version(out, print) == 1
    assert read_tree(outside) == {"precious": b"data"}


def test_pruning_a_link_leaves_what_it_leads_to(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    checkpoint.prepare_folder(out)
    save_version(out, Save(1, 1))
    shutil.move(out / "step-00000001", elsewhere)
    (out / "step-00000001").symlink_to(elsewhere)
    before = read_tree(elsewhere)
    save_version(out, Save(2, 2, 1))
    checkpoint.prepare_folder(out)
    assert find_version(out, print) == 2
    assert sorted(path.name for path in out.glob("step*")) == ["step-00000002"]
    assert read_tree(elsewhere) == before


def find_on_rank(out: Path) -> tuple[int | None, list[str]]:
    with start("cpu"):
        said: list[str] = []
        return find_version(out, said.append), said


def test_damage_that_one_rank_reads_is_every_ranks(tmp_path: Path) -> None:
    victim = Victim(tmp_path / "out")
    rng = random.Random(6)
    for name in victim.content:
        victim.flip(name, rng.randrange(len(victim.content[name])), 0)
        found = run_ranks(find_on_rank, 3, victim.out)
        assert found == [found[0]] * 3 and found[0][0] == 1 and name in found[0][1][0], found
        victim.repair()
    assert run_ranks(find_on_rank, 3, victim.out) == [(2, [])] * 3
