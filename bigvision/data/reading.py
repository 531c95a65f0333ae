"""What a worker does: it reads, transforms and stacks the samples of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from bigvision.data.batch import Batch
from bigvision.data.mixing import Mix, Mixer
from bigvision.data.position import Place, Stream, generators_kept, seed_everything
from bigvision.data.rooms import Rooms, rooms_of, shared_memory
from bigvision.data.sources.base import Source, UnreadableSample
from bigvision.data.transforms import Begun, Steps, Transform
from bigvision.seeds import seed_from


class Request(NamedTuple):
    """One batch: *valid* samples of the stream, or else of the source, from *start* on, then repeats up to *size*."""

    start: int
    valid: int
    size: int
    room: int | None = None
    """where its images go, of the reader's rooms"""

    def places(self, stream: Stream | None) -> list[Place]:
        if stream is not None:
            return stream.places(self.start, self.start + self.valid)
        # A rank that has run out of samples still needs one to repeat.
        indices = range(self.start, self.start + self.valid) if self.valid else range(1)
        return [Place(0, index) for index in indices]


class BadSample(NamedTuple):
    """A sample that could not be read."""

    id: int
    where: str
    reason: str


@dataclass
class Answer:
    """A batch, and what could not be read for it."""

    batch: Batch
    bad: list[BadSample]
    room: tuple[int, int] | None = None
    """key of the rooms and place in them where the images are; None where they have memory of their own"""

    def pin_memory(self) -> Answer:
        return Answer(self.batch.pin_memory(), self.bad)

    def __reduce__(self) -> tuple[Any, ...]:
        # As arrays, which are written out: for each tensor, however small, a file descriptor would be sent.
        batch, mix = self.batch, self.batch.mix
        images = batch.images if self.room is None else None
        numbers = [tensor.numpy() for tensor in (batch.labels, batch.ids, batch.valid)]
        mixed = None if mix is None else ([tensor.numpy() for tensor in (mix.weight, mix.box, mix.share)], mix.apart)
        return _received, (images, self.room, numbers, mixed, [tuple(sample) for sample in self.bad])


def _received(images: Tensor | None, room: tuple[int, int] | None, numbers: Any, mixed: Any, bad: Any) -> Answer:
    if images is None:
        assert room is not None
        images = rooms_of(room[0]).received(room[1])
    mix = None
    if mixed is not None:
        weight, box, share = map(torch.from_numpy, mixed[0])
        mix = Mix(weight, box, share, mixed[1])
    labels, ids, valid = map(torch.from_numpy, numbers)
    return Answer(Batch(images, labels, ids, valid, mix), [BadSample(*sample) for sample in bad])


class Reader(Dataset):
    """Answers requests."""

    TRIES = 100
    """Samples in a row that may be unreadable."""
    AHEAD = 32
    """Samples that are read and begun before the first of them is decoded (see :meth:`Steps.begin`)."""

    def __init__(
        self,
        source: Source,
        transform: Transform,
        seed: int,
        stream: Stream | None = None,
        mixer: Mixer | None = None,
        rooms: Rooms | None = None,
    ) -> None:
        """Args: *stream* gives what stands in for a bad sample; None leaves its place black and not valid."""
        self.source, self.transform, self.seed, self.stream, self.mixer = source, transform, seed, stream, mixer
        self.rooms = rooms

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Of an image, where that is known before there is one."""
        if not isinstance(self.transform, Steps):
            return None
        return self.source.channels, *self.transform.size

    def __getitem__(self, request: Request) -> Answer:
        places = request.places(self.stream)
        shape = self.shape
        images = None if shape is None else self._memory(request, shape)
        # What only makes pixels has to make the first of them before the shape is known.
        ahead = self.AHEAD if images is not None else len(places)
        bad: list[BadSample] = []
        taken: list[_Taken] = []
        with generators_kept():
            for first in range(0, len(places), ahead):
                some = places[first : first + ahead]
                opened = [self._open(place, place) for place in some]
                if images is None:
                    images = self._memory(request, self._shape_of(opened))
                rooms = images[first : first + ahead].unbind()
                filled = [self._fill(*each, bad) for each in zip(rooms, opened, some)]
                for room, one in zip(rooms, filled):
                    taken.append(one if one.begun is None else one._replace(label=one.begun.finish(room)))
        assert images is not None
        if repeats := request.size - len(taken):
            images[len(taken) :] = images[len(taken) - 1].clone()
            taken += taken[-1:] * repeats
        batch = Batch(
            images=images,
            labels=torch.tensor([one.label for one in taken]),
            ids=torch.tensor([one.id for one in taken]),
            valid=torch.tensor([one.begun is not None for one in taken]) & (torch.arange(request.size) < request.valid),
            mix=self.mixer.draw(request.start, request.size, *images.shape[-2:]) if self.mixer else None,
        )
        if not request.valid:
            # What was read only to be padding is another rank's sample.
            bad = []
        if self.rooms is None or request.room is None:
            return Answer(batch, bad)
        return Answer(batch, bad, (self.rooms.key, request.room))

    def _open(self, place: Place, read: Place) -> _Opened | UnreadableSample:
        """The sample *read*, which stands at *place*, with what is random of it drawn."""
        try:
            image, label = self.source.read(read.id)
            # Of the place: a stand-in is not cropped as it was, or will be, in its own.
            seed = seed_from("augment", self.seed, place.epoch, place.id, place.repeat)
            if isinstance(self.transform, Steps):
                torch.default_generator.manual_seed(seed)
                return _Opened(self.transform.begin(image, label), label)
            seed_everything(seed)
            return _Opened(_Made(*self.transform(image, label)), label)
        except UnreadableSample as error:
            return error

    def _fill(self, room: Tensor, opened: _Opened | UnreadableSample, place: Place, bad: list[BadSample]) -> _Taken:
        """Put the pixels of a sample, or of its stand-in, into *room*."""
        read = place
        for _ in range(self.TRIES):
            try:
                if isinstance(opened, UnreadableSample):
                    raise opened
                opened.begun.fill(room)
                return _Taken(opened.begun, opened.label, read.id)
            except UnreadableSample as error:
                bad.append(BadSample(read.id, self.source.where(read.id), str(error)))
            if self.stream is None:
                room.zero_()
                return _Taken(None, self.source.label(place.id), place.id)
            read = self.stream.after(read)
            opened = self._open(place, read)
        raise RuntimeError(f"{self.TRIES} samples in a row cannot be read, the last one {bad[-1].where}: {bad[-1].reason}")

    def _memory(self, request: Request, shape: tuple[int, ...]) -> Tensor:
        """For the images of a batch, laid out pixel by pixel as decoders write them; in a worker, it is shared."""
        if self.rooms is not None and request.room is not None:
            return self.rooms.images(request.room)
        size, (channels, height, width) = request.size, shape
        numbers = size * channels * height * width
        memory = shared_memory(numbers) if get_worker_info() is not None else torch.empty(numbers, dtype=torch.uint8)
        return memory.view(size, height, width, channels).permute(0, 3, 1, 2)

    def _shape_of(self, opened: list[_Opened | UnreadableSample]) -> tuple[int, ...]:
        made = next((one.begun.pixels for one in opened if isinstance(one, _Opened) and isinstance(one.begun, _Made)), None)
        if made is None:
            made, _ = self.transform(torch.zeros(self.source.channels, 8, 8, dtype=torch.uint8), self.source.label(0))
        return tuple(made.shape)


class _Made(NamedTuple):
    """What a transform made that cannot wait; like :class:`Begun`."""

    pixels: Tensor
    target: Any

    def fill(self, room: Tensor) -> None:
        room.copy_(self.pixels)

    def finish(self, room: Tensor) -> Any:
        return self.target


class _Opened(NamedTuple):
    begun: Begun | _Made
    label: int


class _Taken(NamedTuple):
    begun: Begun | _Made | None
    """None where nothing could be read"""
    label: int
    id: int
