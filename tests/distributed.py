"""Runs a function on N gloo ranks. The ranks are kept alive between tests, and forked from processes that have imported torch.

Ranks that a launcher starts have hash seeds of their own, so that a set of names has another order on each. Forked ranks share
that of their server: there are two servers, with different seeds, for even and for odd ranks. The data workers of a rank, which
a launched rank starts from a server of its own, come from the other of the two.
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock


class RankError(AssertionError):
    """A rank raised; holds its traceback."""


class Pool:
    """Processes in which torch and bigvision are imported already: as many as were needed at once so far."""

    def __init__(self) -> None:
        self.workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 300, **kwargs: Any) -> list[Any]:
        """Call a module-level *function* on each rank under torchrun's environment; return what each returned, in order.

        Raises:
            RankError: a rank raised, died or did not end in time; the pool is then started afresh.
        """
        while len(self.workers) < ranks:
            ours, theirs = get_context("forkserver").Pipe()
            self.workers.append((_start(len(self.workers), _serve, theirs), ours))
            theirs.close()
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


def _serve(connection: Connection) -> None:
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
    return [_start(rank, _run_once, _environment(rank, ranks, port), function, args) for rank in range(ranks)]


def _run_once(environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    function(*args)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    values = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


SERVERS = [forkserver.ForkServer() for _ in range(2)]
"""Each imports the package once, before any thread exists, and forks the ranks."""


def _start(rank: int, function: Callable[..., None], *args: Any) -> BaseProcess:
    for number, server in enumerate(SERVERS):
        server.set_forkserver_preload(["bigvision.training", "bigvision.cli", "tests.distributed"])
        with mock.patch.dict(os.environ, PYTHONHASHSEED=str(number + 1)):  # read by a server when it starts
            server.ensure_running()
    server, other = SERVERS[rank % 2], SERVERS[1 - rank % 2]
    process = get_context("forkserver").Process(target=_begin, args=(other._forkserver_address, function, args))
    with mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
        process.start()
    return process


def _begin(server: str, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Call *function* in a rank, whose data workers are forked by the *server* of that address."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what was imported is looked through by no collection
    ours = forkserver._forkserver  # type: ignore[attr-defined]
    ours._forkserver_address, ours.ensure_running = server, lambda: None
    function(*args)


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
