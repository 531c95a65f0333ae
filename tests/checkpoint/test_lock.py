"""One run at a time in a folder: the system's lock, heartbeats, and locks that dead runs have left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bigvision import checkpoint
from bigvision.checkpoint import Lock, lock
from bigvision.errors import InUse, UserError
from bigvision.runtime import RankFailure, start
from tests.checkpoint.test_format import DOCUMENTS, make_fragments, save, whole_tensors
from tests.distributed import start_ranks


def hold(out: Path) -> None:
    with Lock(out):
        (out / "held").touch()
        time.sleep(600)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_second_run_is_refused_by_name_and_a_dead_one_is_not(tmp_path: Path) -> None:
    owner = start_ranks(hold, 1, tmp_path)[0]
    try:
        wait_for(tmp_path / "held")
        with pytest.raises(UserError, match=f"in use by process {owner.pid} on .* since .*choose another --out"):
            Lock(tmp_path)
    finally:
        owner.kill()
        owner.join()
    Lock(tmp_path).release()


def write_owner(out: Path, age: float, **changed: Any) -> None:
    """Leave the lock file of another run, whose last heartbeat was *age* seconds ago."""
    out.mkdir(exist_ok=True)
    owner = {"process": 7, "host": "n1", "since": "2026-11-27 04:00:00", "token": "ab", "boot": "other", "numbers": "other"}
    (out / lock.NAME).write_text(json.dumps(owner | changed))
    then = time.time() - age
    os.utime(out / lock.NAME, (then, then))


def refuse_owned(real: Any) -> Any:
    """A file server that keeps the lock of a host that has died: of the file that names an owner, not of a new one."""

    def lockf(descriptor: int, how: int) -> None:
        if os.fstat(descriptor).st_size:
            raise OSError(errno.EAGAIN, "held")
        real(descriptor, how)

    return lockf


@pytest.mark.parametrize("kept", [False, True], ids=["the lock is free", "the server keeps the lock"])
def test_the_lock_of_a_dead_host_expires(tmp_path: Path, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "SILENT", 1.0)
    monkeypatch.setattr(lock, "EXPIRES", 1.5)
    if kept:
        monkeypatch.setattr(fcntl, "lockf", refuse_owned(fcntl.lockf))
    said: list[str] = []
    write_owner(tmp_path, age=100)
    Lock(tmp_path, said.append).release()
    assert said == (
        [f"{tmp_path / lock.NAME}: process 7 on n1 since 2026-11-27 04:00:00 is dead: its lock is taken over"] * kept
    )

    # Its last heartbeat was a moment ago: this start waits until the lock has expired.
    other = tmp_path / "other"
    write_owner(other, age=0.5)
    begin = time.monotonic()
    Lock(other, said.append).release()
    assert time.monotonic() - begin >= 0.3 and "waiting whether it lives" in said[kept]
    assert os.listdir(other) == [lock.NAME] and (other / lock.NAME).read_bytes() == b""


def test_a_living_owner_on_another_host_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    write_owner(tmp_path, age=1)
    beats = threading.Timer(0.3, os.utime, (tmp_path / lock.NAME,))
    beats.start()
    with pytest.raises(InUse, match=f"in use by process 7 on n1 .* expires 120 s after .* or remove {tmp_path / lock.NAME}"):
        Lock(tmp_path)
    beats.join()
    # An owner of an earlier version has no heartbeats: only the system's lock tells.
    write_owner(tmp_path, age=1000, token="", boot="", numbers="")
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", refuse_owned(fcntl.lockf))
        with pytest.raises(InUse, match="in use by process 7 on n1"):
            Lock(tmp_path)
    Lock(tmp_path).release()


def test_a_dead_process_of_this_host_is_taken_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    here = {"host": socket.gethostname(), "boot": lock._boot(), "numbers": lock._numbers()}
    real = fcntl.lockf
    for pid, dead in ((process.pid, True), (os.getppid(), False)):
        write_owner(tmp_path, age=0, process=pid, **here)
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "lockf", refuse_owned(real))
            if dead:
                Lock(tmp_path).release()
            else:
                with pytest.raises(UserError, match=f"in use by process {pid}"):
                    Lock(tmp_path)


def test_a_run_that_was_taken_over_saves_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with Lock(tmp_path) as mine, start("cpu"):
        before = (tmp_path / lock.NAME).stat().st_mtime
        deadline = time.monotonic() + 10
        while (tmp_path / lock.NAME).stat().st_mtime == before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / lock.NAME).stat().st_mtime > before, "it beats"
        (tmp_path / lock.NAME).rename(tmp_path / "gone")
        while not mine.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RankFailure, match=r"another run has taken .* over"):
            save(tmp_path, 1, make_fragments(0, 1, "rows", whole_tensors()), dict(DOCUMENTS), 10**9, 1)
    assert checkpoint.steps_in(tmp_path) == []


def test_one_process_cannot_lock_twice(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    with Lock(out):
        for _ in range(2):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
                Lock(out)
    with Lock(out):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be written"):
        Lock(tmp_path / "out")
    assert (tmp_path / "elsewhere").read_text() == "precious"
