"""Batches, made by worker processes, the same whatever their number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any

import torch
from torch.utils.data import DataLoader

from bigvision.data.batch import Batch
from bigvision.data.main_module import main_hidden, needs_main
from bigvision.data.mixing import Mixer
from bigvision.data.position import Stream
from bigvision.data.reading import Answer, BadSample, Reader, Request
from bigvision.data.rooms import Rooms
from bigvision.data.sources.base import Source
from bigvision.data.transforms import Transform
from bigvision.data.workers import settle, signals_held, worker_context


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
    stream: Stream | None = None,
    mixer: Mixer | None = None,
) -> Batches:
    """Return this rank's part of each training step's batch, for ever.

    The n-th batch from here is the *rank*-th of *ranks* equal parts of the samples ``position + n * global_batch ..``
    of the stream (see `bigvision.data.position`); batches run on across the ends of epochs. A sample that cannot be read
    gives its place to the next one of the stream.

    Args:
        position: samples consumed so far, over all ranks.
        rank, ranks: in the data-parallel group; *ranks* divides *global_batch* (else `ValueError`).
        workers: processes that read and transform; 0 does it in this one. The batches do not depend on it.
        device: where the batches will go; for CUDA they come in pinned memory.
        stream: of *seed* over the whole source, each sample once in an epoch, by default.
        mixer: mixes samples in pairs, which lie on one rank (else `ValueError`).
    """
    if global_batch % ranks:
        raise ValueError(f"a global batch of {global_batch} does not divide over {ranks} ranks")
    share = global_batch // ranks
    if mixer is not None and (share % (2 * mixer.apart) or position % (2 * mixer.apart)):
        raise ValueError(f"{share} samples of a rank from {position} on are not whole pairs of samples {mixer.apart} apart")
    stream = stream or Stream(seed, source.parts)

    def requests(first: int) -> Iterator[Request]:
        start = position + first * global_batch + rank * share
        while True:
            yield Request(start, share, share)
            start += global_batch

    return Batches(Reader(source, transform, seed, stream, mixer), requests, share, workers, device)


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    rank: int,
    ranks: int,
    workers: int,
    device: torch.device | str = "cpu",
) -> Batches:
    """Return this rank's part of an evaluation, which sees every sample once over all ranks, in the source's order.

    All ranks get the same number of batches, all of *batch* samples, so that they can evaluate a sharded model in
    step. What is missing at the end is filled by repeats with ``valid`` False, and so is what cannot be read.
    """
    length = len(source)

    def requests(first: int) -> Iterator[Request]:
        for begin in range(first * batch * ranks, length, batch * ranks):
            start = min(begin + rank * batch, length)
            yield Request(start, min(batch, length - start), batch)

    return Batches(Reader(source, transform, 0), requests, batch, workers, device)


class Batches(Iterator[Batch]):
    """An iterator over batches. Close it, or use it as a context manager, to end its worker processes.

    When a worker dies, all are started again and go on with the batch that is due.
    """

    RESTARTS = 3
    """In a row, without a batch in between."""

    def __init__(
        self, reader: Reader, requests: Callable[[int], Iterator[Request]], size: int, workers: int, device: torch.device | str
    ) -> None:
        """Args: *requests* gives those from the n-th on, each for a batch of *size* samples."""
        self.bad: list[BadSample] = []
        """What could not be read so far, in the order of the batches; whoever takes note of it may empty it."""
        self.restarts = 0
        """How often the workers had to be started again."""
        self._reader, self._requests, self._size = reader, requests, size
        self._workers, self._pinned = workers, torch.device(device).type == "cuda"
        self._given, self._in_a_row = 0, 0
        self._begin()

    def __next__(self) -> Batch:
        """Raises what a worker raised, with its message; `RuntimeError` when workers are killed again and again."""
        while True:
            try:
                answer = next(self._batches)
                break
            except (OSError, EOFError, RuntimeError) as error:
                # When a worker is killed, what comes up first may be only that its end of some socket is closed.
                workers = getattr(self._batches, "_workers", ())
                if not workers or not wait([worker.sentinel for worker in workers], timeout=1):
                    raise
                if self._in_a_row == self.RESTARTS:
                    raise RuntimeError(
                        "a data worker was killed, perhaps for want of memory or of room in /dev/shm; try fewer data.workers"
                    ) from error
                self.close()
                self._in_a_row += 1
                self.restarts += 1
                self._begin()
        self._given, self._in_a_row = self._given + 1, 0
        self.bad += answer.bad
        return answer.batch

    def close(self) -> None:
        """End the worker processes; ``next`` raises `StopIteration` from now on."""
        batches, self._batches = self._batches, iter(())
        # What DataLoader does when its iterator is collected, which an exception's traceback may put off.
        if shutdown := getattr(batches, "_shutdown_workers", None):
            shutdown()
        for worker in getattr(batches, "_workers", ()):
            # One that is stuck in a read outlives that, and holds back SIGTERM (see signals_held).
            if worker.is_alive():
                worker.kill()

    def _begin(self) -> None:
        with signals_held(), main_hidden():
            self._batches: Iterator[Answer] = iter(self._loader())

    def _loader(self) -> DataLoader:
        """That of the batches from the one on that is due."""
        requests, reader = self._requests(self._given), self._reader
        if self._workers and reader.shape is not None:
            # Those that workers have in advance, the one that is asked for, and that before it, which its user may still have.
            rooms = Rooms(2 * self._workers + 2, self._size, reader.shape)
            requests = (request._replace(room=rooms.take()) for request in requests)
            reader = copy.copy(reader)
            reader.rooms = rooms
        return DataLoader(
            reader,
            batch_size=None,
            sampler=requests,
            collate_fn=_as_read,
            num_workers=self._workers,
            worker_init_fn=settle,
            multiprocessing_context=worker_context(needs_main(reader)) if self._workers else None,
            pin_memory=self._pinned,
            # DataLoader draws a seed for its workers: without this one, from the global generator.
            generator=torch.Generator(),
        )

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_batches"):
            self.close()


def _as_read(answer: Any) -> Any:
    return answer
