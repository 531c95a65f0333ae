"""Micro-batches, made by worker processes, the same whatever their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bigvision.data.batch import Batch, Mix, Mixer
from bigvision.data.on_device import finish
from bigvision.data.order import Stream
from bigvision.data.reading import Answer, BadSample, Reader, Request, Slots
from bigvision.data.sources.base import Source
from bigvision.data.transforms import Steps, Transform
from bigvision.data.workers import main_hidden, needs_main, settle, signals_held, worker_context
from bigvision.errors import UserError
from bigvision.samples import Targets, stack

Collate = Callable[[Sequence[Any]], Targets]
"""Makes the targets of a micro-batch of those of its samples."""
UNIT = Reader.AHEAD
"""Samples that a worker is asked for at once, about: of larger micro-batches a part, of smaller ones several."""


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
    micro_batch: int | None = None,
    collate: Collate = stack,
    on_device: bool = False,
) -> Batches:
    """Return this rank's part of each training step's batch, for ever, as one batch or in micro-batches.

    The n-th part from here is the *rank*-th of *ranks* equal parts of the samples ``position + n * global_batch ..``
    of the stream (see `bigvision.data.order`); batches run on across the ends of epochs. A sample that cannot be read
    gives its place to the next one of the stream.

    Args:
        position: samples consumed so far, over all ranks.
        rank, ranks: in the data-parallel group; *ranks* divides *global_batch* (else `ValueError`).
        workers: processes that read and transform; 0 does it in this one. The batches do not depend on it.
        device: where the batches will go; for CUDA they come in pinned memory.
        stream: of *seed* over the whole source, each sample once in an epoch, by default.
        mixer: mixes samples in pairs, which lie in one micro-batch (else `ValueError`). They are counted from *position* on.
        micro_batch: samples of what comes at once; the last of a step's may be shorter. By default the whole part.
        collate: the task's, which makes a batch's targets of those of its samples.
        on_device: decode JPEGs on *device*, where the images of batches then are.
    """
    if global_batch % ranks:
        raise ValueError(f"a global batch of {global_batch} does not divide over {ranks} ranks")
    share = global_batch // ranks
    size = min(micro_batch or share, share)
    if mixer is not None:
        pair = 2 * mixer.apart
        if share % pair or (size < share and size % pair):
            raise ValueError(f"{share} samples of a rank in micro-batches of {size} are not whole pairs, {mixer.apart} apart")
        # The same at every position of a run that goes on: a global batch holds whole pairs.
        mixer = replace(mixer, origin=position % pair)
    stream = stream or Stream(seed, source.parts)
    together = min(share, size * max(1, UNIT // size))
    begins = range(0, share, together)

    def requests(first: int) -> Iterator[Request]:
        step, part = divmod(first, len(begins))
        while True:
            start = position + step * global_batch + rank * share
            for begin in begins[part:]:
                count = min(together, share - begin)
                yield Request(start + begin, count, count)
            step, part = step + 1, 0

    return Batches(
        Reader(source, transform, seed, stream, mixer, on_device), requests, together, size, workers, device, collate
    )


def eval_batches(
    source: Source,
    transform: Transform,
    *,
    batch: int,
    rank: int,
    ranks: int,
    workers: int,
    device: torch.device | str = "cpu",
    collate: Collate = stack,
    on_device: bool = False,
) -> Batches:
    """Return this rank's part of an evaluation, which sees every sample once over all ranks, in the source's order.

    All ranks get the same number of batches, all of *batch* samples, so that they can evaluate a sharded model in
    step. What is missing at the end is black with ``valid`` False, and so is what cannot be read.
    """
    length = len(source)

    def requests(first: int) -> Iterator[Request]:
        for begin in range(first * batch * ranks, length, batch * ranks):
            start = min(begin + rank * batch, length)
            yield Request(start, min(batch, length - start), batch)

    return Batches(Reader(source, transform, 0, on_device=on_device), requests, batch, batch, workers, device, collate)


class Batches(Iterator[Batch]):
    """An iterator over batches. Close it, or use it as a context manager, to end its worker processes.

    When a worker dies, all are started again and go on with the batch that is due.
    """

    RESTARTS = 3
    """In a row, without a batch in between."""

    def __init__(
        self, reader: Reader, requests: Callable[[int], Iterator[Request]], together: int, size: int, workers: int,
        device: torch.device | str, collate: Collate,
    ) -> None:  # fmt: skip
        """*requests* gives those from the n-th on, of at most *together* samples each, which are cut into batches of *size*."""
        self.bad: list[BadSample] = []
        """What could not be read so far, in the order of the batches; whoever takes note of it may empty it."""
        self.restarts = 0
        """How often the workers had to be started again."""
        self._reader, self._requests, self._together, self._size = reader, requests, together, size
        self._workers, self._device, self._collate = workers, torch.device(device), collate
        self._pinned = self._device.type == "cuda"
        self._ready: deque[Batch] = deque()
        self._taken, self._in_a_row = 0, 0
        self._slots: Slots | None = None
        self._begin()

    def __next__(self) -> Batch:
        """Raises what a worker raised, with its message; `RuntimeError` when workers are killed again and again."""
        while not self._ready:
            try:
                answers = [self._received()]
                while answers[-1].request.begin + answers[-1].request.size < answers[-1].request.together:
                    answers.append(self._received())
            except (OSError, EOFError, RuntimeError) as error:
                # When a worker is killed, what comes up first may be only that its end of some socket is closed.
                workers = _processes(self._answers)
                if not workers or not wait([worker.sentinel for worker in workers], timeout=1):
                    raise
                if self._in_a_row == self.RESTARTS:
                    raise RuntimeError(
                        "a data worker was killed, perhaps because memory ran out: use fewer data.workers"
                    ) from error
                self.close()
                self._in_a_row += 1
                self.restarts += 1
                self._begin()
                continue
            self._taken, self._in_a_row = self._taken + 1, 0
            self._ready += self._batches(answers)
            for answer in answers:
                self.bad += answer.bad
        return self._ready.popleft()

    def _received(self) -> Answer:
        answer = next(self._answers)
        if isinstance(answer, UserError):
            raise answer
        return answer

    @property
    def shared_bytes(self) -> int:
        """Memory for images that the workers share with this process."""
        return 0 if self._slots is None else self._slots.nbytes

    def _batches(self, answers: list[Answer]) -> list[Batch]:
        """The batches of samples that were asked for together."""
        request, mixes = answers[0].request, [answer.mix for answer in answers if answer.mix is not None]
        if request.slot is not None and self._slots is not None:
            images = self._slots.received(request.slot)
        else:
            parts = [answer.images for answer in answers if answer.images is not None]
            images = parts[0] if len(parts) == 1 else torch.cat(parts)
        targets, ids, valid = (
            [one for answer in answers for one in getattr(answer, name)] for name in ("targets", "ids", "valid")
        )
        mix = Mix.join(mixes) if mixes else None
        if self._reader.on_device:
            images = self._decoded(images, answers, targets, ids, valid)
        return [
            Batch(
                images[begin : min(begin + self._size, len(ids))],
                self._collate(targets[begin : begin + self._size]),
                torch.tensor(ids[begin : begin + self._size]),
                torch.tensor(valid[begin : begin + self._size]),
                mix if mix is None else mix.map(lambda tensor: tensor[begin : begin + self._size]),  # noqa: B023
            )
            for begin in range(0, len(ids), self._size)
        ]

    def _decoded(self, images: Tensor, answers: list[Answer], targets: list[Any], ids: list[int], valid: list[bool]) -> Tensor:
        """*images* on the device, those that workers left to it decoded; what stands in for others goes into the lists."""
        encoded = [one for answer in answers for one in answer.encoded or [None] * answer.request.size]

        def again(place: int, buffer: Tensor) -> None:
            # Answers that are asked for together follow each other in the stream.
            found = self._reader.again(answers[0].request.start + place, buffer, answers[-1].bad)
            targets[place], ids[place], valid[place] = found

        assert isinstance(self._reader.transform, Steps)
        return finish(images, encoded, self._reader.transform, self._device, again)

    def close(self) -> None:
        """End the worker processes; ``next`` raises `StopIteration` from now on."""
        answers, self._answers = self._answers, iter(())
        self._ready.clear()
        workers = _processes(answers)
        # DataLoader has no public way to end its workers: it does this when its iterator is collected, which an exception's
        # traceback may put off.
        if shutdown := getattr(answers, "_shutdown_workers", None):
            shutdown()
        for worker in workers:
            # One that is stuck in a read outlives that, and holds back SIGTERM (see signals_held).
            if worker.is_alive():
                worker.kill()

    def _begin(self) -> None:
        """Start with the samples that are due."""
        reader = self._reader
        parts = -(-self._together // UNIT) if self._workers else 1
        if self._workers and reader.shape is not None:
            # For what workers have in advance, what is asked for, and what came before it, which its user may still have.
            reader.slots = self._slots = Slots(2 + -(-2 * self._workers // parts), self._together, reader.shape)
        inherits = bool(self._workers) and needs_main((reader.source, reader.transform))
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=_cut(self._requests(self._taken), parts, reader.slots),
            num_workers=self._workers,
            worker_init_fn=settle,
            multiprocessing_context=worker_context(inherits) if self._workers else None,
            pin_memory=self._pinned,
            # DataLoader draws a seed for its workers: without this one, from the global generator.
            generator=torch.Generator(),
        )
        with signals_held(), main_hidden():
            self._answers: Iterator[Answer | UserError] = iter(loader)

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_answers"):
            self.close()


def _cut(requests: Iterator[Request], parts: int, slots: Slots | None) -> Iterator[Request]:
    """Each request as up to *parts* equal ones for several workers, which put their images into one slot."""
    for start, valid, size, *_ in requests:
        slot = slots.take() if slots is not None else None
        step = -(-size // parts)
        for begin in range(0, size, step):
            count = min(step, size - begin)
            yield Request(start + begin, max(0, min(valid - begin, count)), count, begin, size, slot)


def _processes(answers: Iterator[Any]) -> Sequence[Any]:
    """The worker processes, which DataLoader does not publish: only they tell a worker's death from an error."""
    return getattr(answers, "_workers", ())
