"""How worker processes start, and how they end."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext

_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


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
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
