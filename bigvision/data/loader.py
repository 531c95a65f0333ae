"""Batches, made by worker processes, the same whatever their number."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from bigvision.data.batch import Batch
from bigvision.data.main_module import main_hidden, needs_main
from bigvision.data.mixing import Mixer
from bigvision.data.position import Place, Stream, generators_kept, seed_everything
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

    def requests(first: int) -> Iterator[_Request]:
        start = position + first * global_batch + rank * share
        while True:
            yield _Request(stream.places(start, start + share), share, share, start)
            start += global_batch

    return Batches(_Reader(source, transform, seed, stream, mixer), requests, workers, device)


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

    def requests(first: int) -> Iterator[_Request]:
        for begin in range(first * batch * ranks, length, batch * ranks):
            start = min(begin + rank * batch, length)
            valid = min(batch, length - start)
            # A rank that has run out of samples still needs one to repeat.
            indices = range(start, start + valid) if valid else range(1)
            yield _Request([Place(0, index) for index in indices], valid, batch)

    return Batches(_Reader(source, transform, 0), requests, workers, device)


class BadSample(NamedTuple):
    """A sample that could not be read."""

    id: int
    where: str
    reason: str


class Batches(Iterator[Batch]):
    """An iterator over batches. Close it, or use it as a context manager, to end its worker processes.

    When a worker dies, all are started again and go on with the batch that is due.
    """

    RESTARTS = 3
    """In a row, without a batch in between."""

    def __init__(
        self, reader: _Reader, requests: Callable[[int], Iterator[_Request]], workers: int, device: torch.device | str
    ) -> None:
        """Args: *requests* gives those from the n-th on."""
        self.bad: list[BadSample] = []
        """What could not be read so far, in the order of the batches; whoever takes note of it may empty it."""
        self.restarts = 0
        """How often the workers had to be started again."""
        self._make = lambda first: DataLoader(
            reader,
            batch_size=None,
            sampler=requests(first),
            collate_fn=_as_read,
            num_workers=workers,
            worker_init_fn=_settle_worker,
            multiprocessing_context=_worker_context(reader) if workers else None,
            pin_memory=torch.device(device).type == "cuda",
            # DataLoader draws a seed for its workers: without this one, from the global generator.
            generator=torch.Generator(),
        )
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
            # One that is stuck in a read outlives that, and holds back SIGTERM (see _signals_held).
            if worker.is_alive():
                worker.kill()

    def _begin(self) -> None:
        with _signals_held(), main_hidden():
            self._batches: Iterator[_Answer] = iter(self._make(self._given))

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
    start: int = 0
    """The first one's place in the stream."""


class _Answer(NamedTuple):
    batch: Batch
    bad: list[BadSample]

    def pin_memory(self) -> _Answer:
        return _Answer(self.batch.pin_memory(), self.bad)


class _Reader(Dataset):
    """Reads, transforms and stacks the samples of a request; runs in the workers."""

    TRIES = 100
    """Samples in a row that may be unreadable."""

    def __init__(
        self, source: Source, transform: Transform, seed: int, stream: Stream | None = None, mixer: Mixer | None = None
    ) -> None:
        """Args: *stream* gives what stands in for a bad sample; None leaves its place black and not valid."""
        self.source, self.transform, self.seed, self.stream, self.mixer = source, transform, seed, stream, mixer

    def __getitem__(self, request: _Request) -> _Answer:
        bad: list[BadSample] = []
        with generators_kept():
            read = [self._read(place, bad) for place in request.places]
        repeats = request.size - len(read)
        read += read[-1:] * repeats
        shape = next((pixels.shape for pixels, _, _ in read if pixels is not None), None)
        images = _batch_of(request.size, shape if shape is not None else self._shape())
        for image, (pixels, _, _) in zip(images, read):
            image.copy_(pixels) if pixels is not None else image.zero_()
        readable = torch.tensor([pixels is not None for pixels, _, _ in read])
        batch = Batch(
            images=images,
            labels=torch.tensor([label for _, label, _ in read]),
            ids=torch.tensor([id for _, _, id in read]),
            valid=readable & (torch.arange(request.size) < request.valid),
            mix=self.mixer.draw(request.start, request.size, images.shape[-1]) if self.mixer else None,
        )
        return _Answer(batch, bad)

    def _read(self, place: Place, bad: list[BadSample]) -> tuple[Tensor | None, int, int]:
        """The sample's pixels, label and index, or those of its stand-in."""
        taken = place
        for _ in range(self.TRIES):
            try:
                image, label = self.source.read(taken.id)
                # Of the place: a stand-in is not cropped as it was, or will be, in its own.
                seed_everything(seed_from("augment", self.seed, place.epoch, place.id, place.repeat))
                return self.transform(image), label, taken.id
            except UnreadableSample as error:
                bad.append(BadSample(taken.id, self.source.where(taken.id), str(error)))
            if self.stream is None:
                return None, self.source.label(place.id), place.id
            taken = self.stream.after(taken)
        raise RuntimeError(f"{self.TRIES} samples in a row cannot be read, the last one {bad[-1].where}: {bad[-1].reason}")

    def _shape(self) -> torch.Size:
        with generators_kept():
            return self.transform(torch.zeros(self.source.channels, 8, 8, dtype=torch.uint8)).shape


def _batch_of(size: int, shape: torch.Size) -> Tensor:
    """uint8 (size, *shape*), laid out pixel by pixel as decoders write them; in a worker, in memory that it shares."""
    channels, height, width = shape
    images = torch.empty(0, dtype=torch.uint8)
    if get_worker_info() is not None:
        # As DataLoader's own collation gets it: `share_memory_` would first get private memory, and copy that.
        images.set_(torch.UntypedStorage._new_shared(size * shape.numel(), device="cpu"))  # pyright: ignore[reportCallIssue, reportArgumentType]
    return images.resize_(size, height, width, channels).permute(0, 3, 1, 2)


def _as_read(batch: Any) -> Any:
    return batch


_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def _settle_worker(worker: int) -> None:
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


def _worker_context(reader: _Reader) -> BaseContext:
    """Return how workers start: forked from a clean server process, which has imported what they need.

    Not forked from this process: it runs gloo's and CUDA's threads, whose locks a fork may copy while they are held;
    and a worker that inherits its sockets keeps them open when this rank dies, so that its peers wait until it has seen that
    (see _settle_worker). Only what is defined in the main module cannot be had otherwise without running that again.
    """
    if needs_main(reader):
        return multiprocessing.get_context("fork")
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
