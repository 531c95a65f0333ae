"""Batches, made by worker processes, the same whatever their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from bigvision.data.batch import Batch
from bigvision.data.position import Place, generators_kept, places, seed_everything
from bigvision.data.sample import Source, UnreadableSample
from bigvision.data.transforms import Transform
from bigvision.seeds import seed_from


def train_batches(
    source: Source,
    transform: Transform,
    *,
    seed: int,
    position: int,
    global_batch: int,
    rank: int,
    ranks: int,
    workers: int,
    device: torch.device | str = "cpu",
    images: bool = True,
) -> Batches:
    """Return this rank's part of each training step's batch, for ever.

    The n-th batch from here is the *rank*-th of *ranks* equal parts of the samples ``position + n * global_batch ..``
    of the stream (see `bigvision.data.position`); batches run on across the ends of epochs.

    Args:
        position: samples consumed so far, over all ranks.
        rank, ranks: in the data-parallel group; *ranks* divides *global_batch* (else `ValueError`).
        workers: processes that read and transform; 0 does it in this one. The batches do not depend on it.
        device: where the batches will go; for CUDA they come in pinned memory.
        images: False reads none, for pipeline stages that need labels at most; the batches' images are then (B, 0).
    """
    if global_batch % ranks:
        raise ValueError(f"a global batch of {global_batch} does not divide over {ranks} ranks")
    requests = _train_requests(len(source), seed, position, global_batch, rank, ranks)
    return Batches(_Reader(source, transform, seed, images), requests, workers, device)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    rank: int,
    ranks: int,
    workers: int,
    device: torch.device | str = "cpu",
    images: bool = True,
) -> Batches:
    """Return this rank's part of an evaluation, which sees every sample once over all ranks, in the source's order.

    All ranks get the same number of batches, all of *batch* samples, so that they can evaluate a sharded model in
    step. What is missing at the end is filled by repeats with ``valid`` False.
    """
    requests = _eval_requests(len(source), batch, rank, ranks)
    return Batches(_Reader(source, transform, 0, images), requests, workers, device)


class Batches(Iterator[Batch]):
    """An iterator over batches. Close it, or use it as a context manager, to end its worker processes."""

    def __init__(self, reader: _Reader, requests: Iterable[_Request], workers: int, device: torch.device | str) -> None:
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=requests,
            collate_fn=_as_read,
            num_workers=workers,
            worker_init_fn=_settle_worker,
            multiprocessing_context=_worker_context() if workers else None,
            pin_memory=torch.device(device).type == "cuda",
            # DataLoader draws a seed for its workers: without this one, from the global generator.
            generator=torch.Generator(),
        )
        with _signals_held():
            self._batches: Iterator[Batch | UnreadableSample] = iter(loader)

    def __next__(self) -> Batch:
        """Raises `UnreadableSample` for a bad file, and whatever else a worker raised, with its message."""
        try:
            batch = next(self._batches)
        except (OSError, EOFError, RuntimeError) as error:
            # When a worker is killed, what comes up first may be only that its end of some socket is closed.
            workers = getattr(self._batches, "_workers", ())
            if workers and wait([worker.sentinel for worker in workers], timeout=1):
                raise RuntimeError(
                    "a data worker was killed, perhaps for want of memory or of room in /dev/shm; try fewer data.workers "
                    'or, in a script of your own, guard its start with if __name__ == "__main__"'
                ) from error
            raise
        if isinstance(batch, UnreadableSample):
            raise batch
        return batch

    def close(self) -> None:
        """End the worker processes; ``next`` raises `StopIteration` from now on."""
        batches, self._batches = self._batches, iter(())
        # What DataLoader does when its iterator is collected, which an exception's traceback may put off.
        if shutdown := getattr(batches, "_shutdown_workers", None):
            shutdown()
        for worker in getattr(batches, "_workers", ()):
            # One that is stuck in a read outlives that, and holds back SIGTERM (see _signals_held).
            if worker.is_alive():
                worker.kill()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_batches"):
            self.close()


class _Request(NamedTuple):
    """One batch: the samples at *places*, the first *valid* of which count, then repeats of the last up to *size*."""

    places: list[Place]
    valid: int
    size: int


def _train_requests(length: int, seed: int, position: int, global_batch: int, rank: int, ranks: int) -> Iterator[_Request]:
    share = global_batch // ranks
    start = position + rank * share
    while True:
        yield _Request(places(seed, length, start, start + share), share, share)
        start += global_batch


def _eval_requests(length: int, batch: int, rank: int, ranks: int) -> Iterator[_Request]:
    for first in range(0, length, batch * ranks):
        start = min(first + rank * batch, length)
        valid = min(batch, length - start)
        # A rank that has run out of samples still needs one to repeat.
        indices = range(start, start + valid) if valid else range(1)
        yield _Request([Place(0, index) for index in indices], valid, batch)


class _Reader(Dataset):
    """Reads, transforms and stacks the samples of a request; runs in the workers."""

    def __init__(self, source: Source, transform: Transform, seed: int, images: bool) -> None:
        self.source, self.transform, self.seed, self.images = source, transform, seed, images

    def __getitem__(self, request: _Request) -> Batch | UnreadableSample:
        images, labels = [], []
        try:
            with generators_kept():
                for place in request.places:
                    if not self.images:
                        images.append(torch.empty(0, dtype=torch.uint8))
                        labels.append(self.source.label(place.id))
                        continue
                    image, label = self.source.read(place.id)
                    seed_everything(seed_from("augment", self.seed, place.epoch, place.id))
                    images.append(self.transform(image))
                    labels.append(label)
        except UnreadableSample as error:
            # Returned, as DataLoader would wrap its one line in the worker's traceback.
            return error
        repeats = request.size - len(images)
        return Batch(
            images=torch.stack(images + images[-1:] * repeats),
            labels=torch.tensor(labels + labels[-1:] * repeats),
            ids=torch.tensor([place.id for place in request.places] + [request.places[-1].id] * repeats),
            valid=torch.arange(request.size) < request.valid,
        )


def _as_read(batch: Any) -> Any:
    return batch


_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def _settle_worker(worker: int) -> None:
    """Let a worker end when the process that reads its batches does, however that ended, and not by a signal to stop.

    DataLoader's own watch is for another parent process id. Here that is the server's, which lives as long as its workers.
    """
    # Also when another part of the program started the server, without holding them.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _worker_context() -> BaseContext:
    """Return how workers start: forked from a clean server process, which has imported what they need.

    Not forked from this process: it runs gloo's and CUDA's threads, whose locks a fork may copy while they are held;
    and a worker that inherits its sockets keeps them open when this rank dies, so that its peers would wait for ever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision.transforms.v2"])
    return context


@contextmanager
def _signals_held() -> Iterator[None]:
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
