"""One rank that :mod:`bigvision.launchers.ranks` has started: its work, and what it leaves behind.

Run as ``python -m bigvision.launchers.rank FOLDER`` it is a fresh interpreter's main program, which reads its work from
``FOLDER/job.json``. A forked rank calls :func:`serve` with work of its own.
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
from typing import TYPE_CHECKING, Any

from bigvision.errors import Exit, Stopped, UserError
from bigvision.signals import SAVE, STOP

if TYPE_CHECKING:
    from bigvision.training import Result

JOB, RESULT = "job.json", "result.json"


def main(folder: Path) -> int:
    """Train as the job in *folder* says; return the exit code."""
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    os.environ.update(job["environment"])

    def work() -> Result:
        from bigvision.config import load_config
        from bigvision.training import train_on_rank

        return train_on_rank(load_config(job["config"]))

    return serve(folder, work, job["parent"])


def serve(folder: Path, work: Callable[[], Result], parent: int) -> int:
    """Do *work*, leave what came of it in *folder* for the process that started the ranks, and return the exit code.

    Args:
        parent: that process; when it ends, however, so does this rank.
    """
    rank, attempt = os.environ["RANK"], folder / os.environ["TORCHELASTIC_RESTART_COUNT"]
    attempt.mkdir(exist_ok=True)
    try:
        _settle(parent)
        result = work()
    except BaseException as error:
        code, kind = _verdict(error)
        said = {
            "rank": int(rank), "code": code, "kind": kind, "words": _words(error), "traceback": traceback.format_exc(),
            "time": time.time(), "again": getattr(error, "again", False),
        }  # fmt: skip
        if isinstance(error, Stopped):
            said |= {"name": error.name, "step": error.step, "checkpoint": str(error.checkpoint)}
        _leave(attempt / f"rank-{rank}.json", said)
        return code
    if rank == "0":
        _leave(attempt / RESULT, {"step": result.step, "checkpoint": str(result.checkpoint), "metrics": result.metrics})
    return 0


def _settle(parent: int) -> None:
    for number in (*STOP, SAVE, signal.SIGHUP):
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)  # in a forked rank: what its parent does about it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            raise RuntimeError("the process that started this rank has ended")


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit code, and "mistake", "stopped", "fault" or "exit"."""
    if isinstance(error, UserError):
        return int(Exit.MISTAKE), "mistake"
    if isinstance(error, Stopped):
        return int(Exit.STOPPED), "stopped"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None), "exit"
    return int(Exit.FAULT), "fault"


def _words(error: BaseException) -> str:
    from bigvision.runtime import RankFailure

    if isinstance(error, (UserError, RankFailure, SystemExit)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _leave(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
