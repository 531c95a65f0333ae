"""Runs a function on N gloo ranks. The ranks are kept alive between tests: starting one costs seconds of imports."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

MOST_RANKS = 4


class RankError(AssertionError):
    """A rank raised; holds its traceback."""


class Pool:
    """Up to :data:`MOST_RANKS` processes in which torch and bigvision are imported already."""

    def __init__(self) -> None:
        self.workers: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 300, **kwargs: Any) -> list[Any]:
        """Call a module-level *function* on each rank under torchrun's environment; return what each returned, in order.

        Raises:
            RankError: a rank raised, died or did not end in time; the pool is then started afresh.
        """
        if not self.workers:
            self._start()
        port = free_port()
        for rank, (_, connection) in enumerate(self.workers[:ranks]):
            connection.send((_environment(rank, ranks, port), function, args, kwargs))
        results: dict[int, Any] = {}
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.workers[:ranks])}
        while waiting:
            ready = wait(list(waiting), timeout)
            if not ready:
                self.stop()
                raise RankError(f"ranks {sorted(waiting.values())} did not end within {timeout} s")
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    failed, results[rank] = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    failed, results[rank] = True, "the process died"
                if failed:
                    self.stop()
                    raise RankError(f"rank {rank} of {ranks}:\n{results[rank]}")
        return [results[rank] for rank in range(ranks)]

    def stop(self) -> None:
        """End the processes; the next :meth:`run` starts others."""
        for process, connection in self.workers:
            connection.close()
            process.kill()
            process.join()
        self.workers = []

    def _start(self) -> None:
        context = _context()
        for _ in range(MOST_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self.workers.append((process, ours))


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            environment, function, args, kwargs = connection.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            answer = (False, function(*args, **kwargs))
        except BaseException:
            answer = (True, traceback.format_exc())
        connection.send(answer)


def start_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[BaseProcess]:
    """Start processes that a test may kill; they run a module-level *function* under torchrun's environment."""
    port = free_port()
    processes = []
    for rank in range(ranks):
        process = _context().Process(target=_run_once, args=(_environment(rank, ranks, port), function, args))
        process.start()
        processes.append(process)
    return processes


def _run_once(environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    function(*args)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    values = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


def _context() -> ForkServerContext:
    # Imported once by the server, from which the ranks are forked before any thread exists.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bigvision.training", "bigvision.cli", "tests.distributed"])
    return context


def free_port() -> int:
    """A TCP port on which nobody listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


POOL = Pool()
atexit.register(POOL.stop)


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, **kwargs: Any) -> list[Any]:
    """Call a module-level *function* on *ranks* gloo ranks and return what each returned."""
    return POOL.run(function, ranks, *args, **kwargs)
