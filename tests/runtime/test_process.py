"""The process group: shared in a process, with the run's timeouts, and aborted after a fault."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from bigvision.config import LimitsConfig
from bigvision.errors import Exit, UserError
from bigvision.runtime import Identity, Watchdog, process, start
from bigvision.runtime.diagnosis import News
from bigvision.runtime.process import lacks_shared_memory
from bigvision.runtime.watchdog import NCCL_DEFAULTS, Board
from tests.distributed import run_ranks

LONG = timedelta(seconds=4321)


def share() -> list[object]:
    """Two users with different meshes, of which the first leaves first."""
    found: list[object] = []
    first, second = start("cpu", timeout=LONG), start("cpu", replicas=2, timeout=LONG)
    one = first.__enter__()
    # As where NCCL's groups are split, whose gloo half has torch's own default whatever was asked for.
    with mock.patch.object(distributed_c10d, "_get_default_timeout", lambda backend: timedelta(minutes=30)):
        two = second.__enter__()
    found += [one.mesh.shape, two.mesh.shape, one.identity == two.identity]
    found.append({group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map})
    with start("cpu") as third:
        found.append(third.mesh is one.mesh)
    first.__exit__(None, None, None)
    dist.barrier(two.mesh["replicate"].get_group())
    second.__exit__(None, None, None)
    found.append(dist.is_initialized())
    return found


def test_the_process_group_is_shared_and_its_meshes_have_the_timeout_of_the_run() -> None:
    for found in run_ranks(share, 2):
        assert found == [(1, 1, 2), (1, 2, 1), True, {LONG}, True, False]
    assert distributed_c10d.default_pg_timeout == timedelta(minutes=30)


def page_faults() -> int:
    """Of memory of which as much was freed before."""
    before = after = 0
    with start("cpu"):
        for _ in range(6):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            parts = [torch.empty(16 << 20, dtype=torch.uint8).fill_(1) for _ in range(6)]
            del parts
            after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return after - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
def test_freed_memory_is_kept_on_the_cpu() -> None:
    assert run_ranks(page_faults, 1)[0] < 10000, "of 24,576 pages of 4 KB"


def test_another_device_cannot_share_it() -> None:
    with start("cpu"):
        assert os.environ["LOCAL_RANK"] == "0"
        with (
            mock.patch.object(process, "choose_device", lambda device, identity: torch.device("cuda", 0)),
            pytest.raises(UserError, match=r"parallel\.device: cuda, but this process has joined the ranks on cpu"),
            start("cuda"),
        ):
            pass
        with pytest.raises(UserError, match=r"parallel\.stages: 2 does not divide the 1 ranks"), start("cpu", stages=2):
            pass
        assert dist.is_initialized(), "as before"
    assert not dist.is_initialized() and "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (ValueError("planted"), "abort"),
        (KeyboardInterrupt(), "abort"),
        (UserError("alike on all"), "destroy"),
        (None, "destroy"),
    ],
)
def test_groups_are_aborted_after_a_fault(error: BaseException | None, ends: str) -> None:
    """NCCL as gloo, which aborts too. A user's mistake is the same on all ranks, which leave together."""
    called = []
    with (
        mock.patch.object(process, "uses_nccl", lambda: True),
        mock.patch.object(process.atexit, "register"),
        mock.patch.object(process.distributed_c10d, "_abort_process_group", lambda: called.append("abort")),
        mock.patch.object(process.dist, "destroy_process_group", lambda: called.append("destroy")),
    ):
        try:
            with start("cpu"):
                if error is not None:
                    raise error
        except BaseException as raised:
            assert raised is error
    assert called == [ends]
    dist.destroy_process_group()


FAIL = """
import atexit, time
from bigvision.runtime import process

process.ABORTING = 1.0
process.uses_nccl = lambda: True
process.distributed_c10d._abort_process_group = lambda: time.sleep(1000)
atexit.register(time.sleep, 1000)  # what is registered later is called before
with process.start("cpu"):
    print(time.time(), flush=True)
    raise ValueError("planted")
"""


def test_a_hanging_abort_does_not_hold_the_process() -> None:
    """As where ncclCommAbort hangs, and then the destructors of the groups, when the interpreter ends."""
    done = subprocess.run([sys.executable, "-c", FAIL], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "ValueError: planted" in done.stderr, done.stderr
    assert time.time() - float(done.stdout) < 10


def test_torchs_own_watchdog_speaks_after_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its variables are set where the user has not set them, under any of their names, and are taken back."""
    for name, (older, _) in NCCL_DEFAULTS.items():
        for each in (name, *older):
            monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    limits = LimitsConfig(step=3000.0, grace=50.0)
    with Watchdog(limits):
        assert float(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"]) > 2 * 3000
        # torch waits 4 times as long after an asynchronous error, before it ends the process.
        assert 4 * float(os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"]) / 1000 > 50
        assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3" and os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
        assert "TORCH_FR_BUFFER_SIZE" not in os.environ
    assert not set(NCCL_DEFAULTS) & set(os.environ)
    known = b"".join(path.read_bytes() for path in Path(torch.__file__).parent.joinpath("lib").glob("libtorch_c*.so"))
    if b"TORCH_NCCL_BLOCKING_WAIT" in known:  # a build with NCCL
        for name in NCCL_DEFAULTS:
            assert name.encode() in known, f"torch {torch.__version__} does not read {name}"


def test_the_trace_of_nccl_is_written_beside_the_stacks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where a limit has run out; torch's flight recorder is asked also where there is no device, and has nothing then."""
    watch = Watchdog(LimitsConfig(), tmp_path / "stacks")
    watch.identity = Identity(3, 4, 3, 4, "slurm")
    watch.board = Board(News(watch.identity, {}, 1.0))
    for code, files in ((Exit.FAULT, set()), (Exit.HUNG, {"rank-3.txt", "nccl-3.json"})):
        with mock.patch.object(process, "uses_nccl", lambda: True), mock.patch.object(os, "_exit") as ended:
            watch._end("the words", code)
        faulthandler.cancel_dump_traceback_later()
        assert {path.name for path in tmp_path.glob("stacks/*")} == files
        ended.assert_called_once_with(code)
    assert "pg_config" in json.loads((tmp_path / "stacks" / "nccl-3.json").read_text())
    assert process.nccl_trace() == b"", "without NCCL"
    assert capfd.readouterr().err.count("error: rank 3: the words") == 2


@pytest.mark.parametrize(
    ("device", "ranks", "megabytes", "disabled", "warns"),
    [
        ("cuda", 8, 64, "", True),
        ("cuda", 2, 64, "", True),
        ("cuda", 8, 1024, "", False),
        ("cuda", 1, 1, "", False),
        ("cuda", 8, 64, "1", False),
        ("cpu", 8, 1, "", False),
    ],
)
def test_a_small_dev_shm_is_reported_before_nccl_fails(
    device: str, ranks: int, megabytes: int, disabled: str, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_SHM_DISABLE", disabled)
    monkeypatch.setattr(os, "statvfs", lambda path: mock.Mock(f_bavail=megabytes << 8, f_frsize=4096))
    text = lacks_shared_memory(torch.device(device), ranks)
    assert (text is not None) == warns
    assert text is None or (f"has {megabytes} MB left" in text and f"need {64 * ranks} MB" in text and "--shm-size=1g" in text)


def test_without_dev_shm_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "statvfs", missing)
    assert lacks_shared_memory(torch.device("cuda"), 8) is None
