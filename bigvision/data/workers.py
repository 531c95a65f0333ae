"""Worker processes: how they start, what of the main module they need, how they end; and threads that read many files.

A new interpreter gets objects pickled, and multiprocessing first runs the main script in it again, in case a class is defined
there. A script without a guard would so start its training once more. Seldom is there such a class: then nothing of the main
module is needed, and it is not sent; else the workers are forked, which inherit the class and need no module.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker, spawn, util
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Item = TypeVar("Item")
Found = TypeVar("Found")
EVERY = 5.0
"""Seconds between two lines of :func:`each`."""
THREADS = 16
"""Whose reading overlaps."""
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


# How they start.


def worker_context(inherits: bool) -> BaseContext:
    """Return how workers start: forked from a clean server process, which has imported what they need.

    Not forked from this process: it runs gloo's and CUDA's threads, whose locks a fork may copy while they are held;
    and a worker that inherits its sockets keeps them open when this rank dies, so that its peers wait until it has seen that
    (see `settle`). Only what is defined in the main module (*inherits*) cannot be had otherwise without running that again.
    """
    if inherits:
        return multiprocessing.get_context("fork")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bigvision.data.loader", "torchvision.transforms.v2"])
    return context


def fork_server(in_fork: bool = False) -> None:
    """Fork the server of :func:`worker_context` from this process, which has imported all that workers need.

    A server that starts as a new interpreter imports torch and torchvision first: more than a second before the first batch,
    of each rank. Call this at the start of a program, before gloo, CUDA or torch's own threads: a fork may copy their locks
    while they are held. Python's and OpenBLAS's threads are prepared for forks. Where the server runs already nothing happens.

    *in_fork*: this process was forked a moment ago from one that has only imported, so it has no threads of earlier work.
    """
    if sys.platform != "linux" or sys.version_info >= (3, 14):
        return  # macOS's own threads do not survive a fork; a later Python's server takes a key from a third file
    if multiprocessing.parent_process() is not None and not in_fork:
        return  # a program that has started others may have run before, and left threads

    def forked(path: object, arguments: object, passed: Sequence[int]) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the thread that waits for signals
            if (pid := os.fork()) > 0:
                return pid
        try:
            signal.set_wakeup_fd(-1)
            # The writing end of the server's own pipe is among them: while that is open, the server does not end.
            listener, alive = passed
            kept = sorted({0, 1, 2, listener, alive})
            for below, above in itertools.pairwise([*kept, os.sysconf("SC_OPEN_MAX")]):
                os.closerange(below + 1, above)
            forkserver.main(listener, alive, [])
        finally:
            os._exit(0)

    with signals_held(), _LOCK:
        before, util.spawnv_passfds = util.spawnv_passfds, forked
        try:
            forkserver.ensure_running()
        finally:
            util.spawnv_passfds = before


@contextmanager
def main_hidden() -> Iterator[None]:
    """Let the processes that this thread starts in here not run the main module again.

    multiprocessing has no setting for that. What it tells a new process is what `spawn.get_preparation_data` returns, with the
    main module's name or path; it asks in no other place.
    """
    caller = threading.get_ident()
    with _LOCK:
        before = spawn.get_preparation_data

        def prepared(name: str) -> dict[str, object]:
            data: dict[str, object] = before(name)
            if threading.get_ident() == caller:
                data.pop("init_main_from_name", None)
                data.pop("init_main_from_path", None)
            return data

        spawn.get_preparation_data = prepared
        try:
            yield
        finally:
            spawn.get_preparation_data = before


_LOCK = threading.RLock()


def needs_main(value: Any) -> bool:
    """Whether another process can only get *value* with the main module, where something in it is defined."""
    try:
        _Finder().dump(value)
    except _InMain:
        return True
    except Exception:
        return False  # it cannot be sent at all, which is reported when it is
    return False


class _InMain(Exception):
    """Something in the value is defined in the main module."""


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _Finder(ForkingPickler):
    """Goes through an object as sending it would, without side effects and without the bytes of tensors."""

    def __init__(self) -> None:
        super().__init__(_Nowhere(), 5)

    def reducer_override(self, obj: Any) -> Any:
        if getattr(obj, "__module__", None) == "__main__":
            raise _InMain
        if isinstance(obj, (Tensor, torch.UntypedStorage, torch.TypedStorage)):
            return int, ()
        if isinstance(obj, np.ndarray) and not obj.dtype.hasobject:
            return int, ()
        return NotImplemented


@contextmanager
def signals_held() -> Iterator[None]:
    """Let the workers that start in here ignore the signals that ask a run to stop.

    Schedulers and terminals send them to every process. The rank answers by saving a checkpoint, for which it still
    needs its workers; they end when it closes them or when it dies. The mask is inherited by the server process and
    by what it forks; a signal to this process meanwhile is not lost but comes at the end.
    """
    # multiprocessing starts its tracker before the server, and unblocks SIGTERM when it does: have it running.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# How they end.


def settle(worker: int) -> None:
    """Let a worker end when the process that reads its batches does, however that ended, and not by a signal to stop.

    DataLoader's own watch is for another parent process id. Here that is the server's, which lives as long as its workers.
    """
    # A forked worker has the rank's process groups, whose destructors would wait for the rank's threads.
    gc.freeze()
    # Also when another part of the program started the server, without holding them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)  # what is left of the worker waits for the parent; sys.exit would end this thread alone

    threading.Thread(target=watch, daemon=True).start()


# Threads.


def each(function: Callable[[Item], Found], items: Sequence[Item], what: str, *, report: bool) -> list[Found]:
    """Return *function* of each of *items*, several at a time; raises the first error, in their order, of those that ended.

    With *report* stderr gets every few seconds *what* is done, as in "data.train: shards indexed", and with how many.
    """
    with ThreadPoolExecutor(min(THREADS, len(items) or 1)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            while (state := wait(futures, EVERY if report else None, FIRST_EXCEPTION)).not_done:
                if any(future.exception() for future in state.done):
                    break
                print(f"{what}: {len(state.done)} of {len(futures)}", file=sys.stderr, flush=True)
            return [future.result() for future in futures if future in state.done]
        finally:
            for future in futures:
                future.cancel()
