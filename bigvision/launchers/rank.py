"""One rank that ``ranks.py`` has started: its work, and what it leaves behind. Imports nothing heavy at the top.

``python -m bigvision.launchers.rank FOLDER`` reads its work from ``FOLDER/job.json``. A forked rank calls `serve`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bigvision.disk import replace
from bigvision.errors import Exit, Stopped, UserError
from bigvision.signals import SAVE, STOP

if TYPE_CHECKING:
    from bigvision.training import Result

JOB, RESULT = "job.json", "result.json"


def serve(folder: Path, work: Callable[[], Result], parent: int) -> int:
    """Do *work*, leave what came of it in *folder* for *parent*, which started the ranks, and return the exit code.

    When that process ends, however it does, so does this rank.
    """
    rank, attempt = os.environ["RANK"], folder / os.environ["TORCHELASTIC_RESTART_COUNT"]
    attempt.mkdir(exist_ok=True)
    try:
        _settle(parent)
        result = work()
    except BaseException as error:
        code, kind, words = _describe(error)
        report = {
            "rank": int(rank), "kind": kind, "words": words, "traceback": traceback.format_exc(),
            "time": time.time(), "again": getattr(error, "again", False),
        }  # fmt: skip
        if isinstance(error, Stopped):
            report |= {"name": error.name, "step": error.step, "checkpoint": str(error.checkpoint)}
        replace(attempt / f"rank-{rank}.json", json.dumps(report).encode())
        return code
    if rank == "0":
        left = {
            "step": result.step, "checkpoint": str(result.checkpoint), "metrics": result.metrics, "reason": result.reason,
        }  # fmt: skip
        replace(attempt / RESULT, json.dumps(left).encode())
    return 0


def _settle(parent: int) -> None:
    for number in (*STOP, SAVE, signal.SIGHUP):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)  # in a forked rank: what its parent does about it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise RuntimeError("the process that started this rank has ended")


def _describe(error: BaseException) -> tuple[int, str, str]:
    """The exit code; "mistake", "stopped", "fault" or "exit"; and the words for it."""
    from bigvision.runtime import RankFailure

    if isinstance(error, UserError):
        return int(Exit.MISTAKE), "mistake", str(error)
    if isinstance(error, Stopped):
        return int(Exit.STOPPED), "stopped", str(error)
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None), "exit", str(error)
    return int(Exit.FAULT), "fault", str(error) if isinstance(error, RankFailure) else f"{type(error).__name__}: {error}"


def main(folder: Path) -> int:
    """Train on the job in *folder*; return the exit code."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    os.environ.update(job["environment"])

    def work() -> Result:
        from bigvision.config import load_config
        from bigvision.training import train_on_rank

        return train_on_rank(load_config(job["config"]), origins=job["origins"])

    return serve(folder, work, job["parent"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
