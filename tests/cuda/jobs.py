"""Runs the tests' jobs in processes of their own, several at a time on one device.

A test declares what it needs with ``@job(function, *arguments)``, and reads what the function returned from the fixture
``results``. Tests with the same job share one run of it. All jobs of the chosen tests start when the tests have been collected,
so a test mostly waits for what is already under way. Each job has a process of its own: a fault of CUDA, a memory limit or a
setting in one does not reach another.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

LIMIT = 600.0 if os.environ.get("BIGVISION_CUDA_TESTS_ON") == "cpu" else 200.0
"""Seconds after which a job is ended."""
LOG = "output.txt"
"""What a job and its children print, in its folder."""
AT_ONCE = max(2, min(6, (os.cpu_count() or 1) // 2))
"""Jobs that share the device."""
# Not forked from a process that has imported torch: whether an import has touched CUDA would then matter.
CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Job:
    """A module-level *function*, called with a folder of its own and *arguments*."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    seconds: float = 20.0
    """About how long it takes on a GPU: long ones start first."""
    alone: bool = False
    """Whether it measures time, and so has to wait until no other job runs."""

    @property
    def key(self) -> str:
        return f"{self.function.__module__}.{self.function.__name__}{self.arguments!r}"


def job(function: Callable[..., Any], *arguments: Any, seconds: float = 20.0, alone: bool = False) -> pytest.MarkDecorator:
    """Mark a test, or one of its parameters, as one that reads this job's result."""
    return pytest.mark.job(Job(function, arguments, seconds, alone))


class JobError(AssertionError):
    """A job raised, died or did not end in time; holds its traceback."""


class Jobs:
    """All jobs of a session."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bigvision-cuda-"))
        self.futures: dict[str, Future[Any]] = {}
        self.times: dict[str, float] = {}
        self.processes: set[BaseProcess] = set()
        self.pool = ThreadPoolExecutor(AT_ONCE)
        self.last = ThreadPoolExecutor(1)
        self.closed = threading.Event()

    def start(self, jobs: Iterable[Job]) -> None:
        """Begin with *jobs*, the longest first, each once."""
        chosen = {job.key: job for job in jobs if job.key not in self.futures}
        shared = [job for job in chosen.values() if not job.alone]
        for job in sorted(shared, key=lambda job: -job.seconds):
            self.futures[job.key] = self.pool.submit(self._run, job)
        before = list(self.futures.values())
        for job in chosen.values():
            if job.alone:
                self.futures[job.key] = self.last.submit(self._run, job, before)

    def result(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the job returned, once it has ended.

        Raises:
            JobError: it failed; or the test does not declare it.
        """
        key = Job(function, arguments).key
        if key not in self.futures:
            raise JobError(f"the test has no mark for the job {key}")
        return self.futures[key].result()

    def close(self) -> None:
        """End what still runs."""
        self.closed.set()
        for future in self.futures.values():
            future.cancel()
        for process in list(self.processes):
            process.kill()
        self.pool.shutdown(cancel_futures=True)
        self.last.shutdown(cancel_futures=True)

    def _run(self, job: Job, before: Iterable[Future[Any]] = ()) -> Any:
        wait(before)
        if self.closed.is_set():
            raise JobError("the session has ended")
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        begin = time.monotonic()
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=serve, args=(theirs, job.function, (folder, *job.arguments)))
        process.start()
        self.processes.add(process)
        theirs.close()
        try:
            if not ours.poll(LIMIT):
                raise JobError(f"{job.key} did not end within {LIMIT:.0f} s")
            failed, answer = ours.recv()
        except EOFError:
            process.join(10)
            failed, answer = True, f"its process died with code {process.exitcode}\n{(folder / LOG).read_text()[-4000:]}"
        finally:
            self.processes.discard(process)
            process.join(5)
            process.kill()
            self.times[job.key] = time.monotonic() - begin
        if failed:
            raise JobError(f"{job.key}:\n{answer}")
        return answer


def serve(connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """The work of a job's process."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // AT_ONCE))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    sys.stdout.flush()
    with (arguments[0] / LOG).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        answer = (False, function(*arguments))
    except BaseException:
        answer = (True, traceback.format_exc())
    connection.send(answer)


def start_process(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
) -> BaseProcess:  # fmt: skip
    """Start a process that runs a module-level *function*, and that a job may kill."""
    process = CONTEXT.Process(target=_in_environment, args=(dict(environment or {}), function, arguments))
    process.start()
    return process


def _in_environment(environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // AT_ONCE))
    function(*arguments)
