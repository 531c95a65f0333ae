"""What a worker does: it reads and transforms samples into memory that it shares with its rank."""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bigvision.data.batch import Mix, Mixer
from bigvision.data.on_device import Encoded, leave_encoded
from bigvision.data.order import Place, Stream, generators_kept, seed_everything
from bigvision.data.sources.base import Source, UnreadableSample, described
from bigvision.data.transforms import Begun, Steps, Transform
from bigvision.errors import UserError, one_line
from bigvision.samples import each_tensor, seed_from


class Request(NamedTuple):
    """*valid* samples of the stream, or else of the source, from *start* on, then padding up to *size*."""

    start: int
    valid: int
    size: int
    begin: int = 0
    """Their place among the samples that are asked for together."""
    together: int = 0
    """How many these are."""
    slot: int | None = None
    """Where the images of all of them go, of the reader's slots."""


class BadSample(NamedTuple):
    """A sample that could not be read."""

    id: int
    where: str
    reason: str


@dataclass
class Answer:
    """The samples of a request, and what could not be read for it."""

    request: Request
    images: Tensor | None
    """None where they are in the request's slot."""
    targets: list[Any]
    ids: list[int]
    valid: list[bool]
    mix: Mix | None
    bad: list[BadSample]
    slots: int | None = None
    """The key of the slots."""
    encoded: list[Encoded | None] | None = None
    """Of each sample, what a device is to make its pixels of; None where there is no such sample."""

    def pin_memory(self) -> Answer:
        """Copy the images to page-locked memory (`DataLoader` calls this in its pinning thread)."""
        if self.images is not None:
            self.images = self.images.pin_memory()
        elif self.slots is not None and self.request.slot is not None:
            begin = self.request.begin
            _slots[self.slots].pin(self.request.slot, begin, begin + self.request.size)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        # As arrays, which are written to the worker's pipe: torch would put each tensor in a file of its own in /dev/shm.
        images = None if self.images is None else self.images.permute(0, 2, 3, 1).numpy()
        mix = None if self.mix is None else vars(self.mix.map(Tensor.numpy))
        targets = each_tensor(np.asarray, self.targets)
        return _received, (tuple(self.request), images, targets, self.ids, self.valid, mix, self.bad, self.slots, self.encoded)


def _received(
    request: Any, images: Any, targets: Any, ids: Any, valid: Any, mix: Any, bad: Any, slots: Any, encoded: Any
) -> Answer:  # fmt: skip
    mixed = None if mix is None else Mix(**mix).map(torch.from_numpy)
    pixels = None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2)
    targets = each_tensor(torch.as_tensor, targets)
    return Answer(Request(*request), pixels, targets, ids, valid, mixed, bad, slots, encoded)


class Reader(Dataset):
    """Answers requests."""

    TRIES = 100
    """Samples in a row that may be unreadable."""
    AHEAD = 32
    """Samples that are read and begun before the first of them is decoded (see :meth:`Steps.begin`)."""

    def __init__(
        self, source: Source, transform: Transform, seed: int, stream: Stream | None = None, mixer: Mixer | None = None,
        on_device: bool = False,
    ) -> None:  # fmt: skip
        """Args: *stream* gives what stands in for an unreadable sample; None leaves its place black and not valid. *on_device*
        leaves JPEGs to the device where that can make their pixels."""
        self.source, self.transform, self.seed, self.stream, self.mixer = source, transform, seed, stream, mixer
        self.on_device = on_device and isinstance(transform, Steps)
        self.slots: Slots | None = None

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """Of an image, where that is known before there is one."""
        return (self.source.channels, *self.transform.size) if isinstance(self.transform, Steps) else None

    def __getitem__(self, request: Request) -> Answer | UserError:
        try:
            return self._answer(request)
        except UserError as error:
            return error  # raised where it arrives: `DataLoader` would put the worker's traceback into its one line

    def _answer(self, request: Request) -> Answer:
        start, stop = request.start, request.start + request.valid
        places = self._places(start, stop)
        shape = self.shape
        images = None if shape is None else self._memory(request, shape)
        # What only makes pixels has to make the first of them before the shape is known.
        ahead = self.AHEAD if images is not None else max(1, len(places))
        bad: list[BadSample] = []
        taken: list[_Taken] = []
        encoded: list[Encoded | None] = []
        with generators_kept():
            for first in range(0, len(places), ahead):
                some = places[first : first + ahead]
                opened = [self._open(place, place) for place in some]
                if images is None:
                    images = self._memory(request, self._shape_of(opened))
                buffers = images[first : first + ahead].unbind()
                left = [self._left(*each) for each in zip(buffers, opened)]
                filled = [
                    _Taken(begun, None, place.id) if file is not None and not isinstance(begun, UnreadableSample)
                    else self._fill(buffer, begun, place, bad)
                    for buffer, begun, place, file in zip(buffers, opened, some, left)
                ]  # fmt: skip
                for buffer, one, file in zip(buffers, filled, left):
                    if file is not None:
                        taken.append(one._replace(target=one.opened.target if isinstance(one.opened, Begun) else None))
                    else:
                        taken.append(one if one.opened is None else one._replace(target=one.opened.finish(buffer)))
                encoded += left
            if images is None:
                images = self._memory(request, self._shape_of([]))
        valid = [one.opened is not None for one in taken]
        if padding := request.size - len(taken):
            images[len(taken) :] = 0
            taken += (taken[-1:] or [_Taken(None, self._stand_in(0), 0)]) * padding
            valid += [False] * padding
        return Answer(
            request,
            images if self._slot(request) is None else None,
            [one.target for one in taken],
            [one.id for one in taken],
            valid,
            self.mixer.draw(request.start, request.size, *images.shape[-2:]) if self.mixer else None,
            bad,
            None if self.slots is None else self.slots.key,
            encoded + [None] * padding if any(one is not None for one in encoded) else None,
        )

    def _places(self, start: int, stop: int) -> Sequence[Place]:
        return self.stream.places(start, stop) if self.stream else [Place(0, index) for index in range(start, stop)]

    def _left(self, buffer: Tensor, opened: object) -> Encoded | None:
        """What is left for the device."""
        return leave_encoded(opened, buffer) if self.on_device and isinstance(opened, Begun) else None

    def again(self, index: int, buffer: Tensor, bad: list[BadSample]) -> tuple[Any, int, bool]:
        """Make the sample at *index* of the stream, or else of the source, in *buffer*; returns its target, its id, and whether
        it could be read. For what a device could not decode, in the rank itself."""
        (place,) = self._places(index, index + 1)
        with generators_kept():
            one = self._fill(buffer, self._open(place, place), place, bad)
            return one.target if one.opened is None else one.opened.finish(buffer), one.id, one.opened is not None

    def _open(self, place: Place, read: Place) -> Begun | _Made | UnreadableSample:
        """The sample *read*, which stands at *place*, with what is random of it drawn."""
        try:
            image, target = self.source.read(read.id)
            # Floats, for one, would become black bytes in silence.
            if not isinstance(image, (bytes, Image.Image)) and not _is_pixels(image, self.source.channels):
                raise UserError(
                    f"{self.source.where(read.id)}: its image is {described(image)}; a source gives a file's bytes, an image "
                    f"of Pillow's, or a uint8 tensor (C, H, W) with {self.source.channels} channels{_hint(image)}"
                )
            # Of the place: a stand-in is not cropped as it was, or will be, in its own.
            seed = seed_from("augment", self.seed, place.epoch, place.id, place.repeat)
            if isinstance(self.transform, Steps):
                torch.default_generator.manual_seed(seed)
                return self.transform.begin(image, target)
            seed_everything(seed)
            return self._made(self.transform(image, target), read)
        except UnreadableSample as error:
            return error

    def _made(self, made: Any, read: Place) -> _Made:
        """What a transform of the user's made. Raises `UserError` for anything but bytes of as many channels as the source."""
        name = getattr(self.transform, "__name__", type(self.transform).__name__)
        if not isinstance(made, tuple) or len(made) != 2:
            raise UserError(f"transform {name}: it returned {described(made)}; return the pixels and the target")
        if not _is_pixels(made[0], self.source.channels):
            raise UserError(
                f"transform {name}: it made {described(made[0])} of {self.source.where(read.id)}; return a uint8 tensor "
                f"(C, H, W) with {self.source.channels} channels, which is normalised on the device{_hint(made[0])}"
            )
        return _Made(*made)

    def _fill(self, buffer: Tensor, opened: Begun | _Made | UnreadableSample, place: Place, bad: list[BadSample]) -> _Taken:
        """Put the pixels of a sample, or of its stand-in, into *buffer*."""
        read = place
        for _ in range(self.TRIES):
            try:
                if isinstance(opened, UnreadableSample):
                    raise opened
                opened.fill(buffer)
                return _Taken(opened, None, read.id)
            except UnreadableSample as error:
                bad.append(BadSample(read.id, self.source.where(read.id), str(error)))
            if self.stream is None:
                buffer.zero_()
                return _Taken(None, self._stand_in(place.id), place.id)
            read = self.stream.after(read)
            opened = self._open(place, read)
        raise RuntimeError(f"{self.TRIES} samples in a row cannot be read, the last one {bad[-1].where}: {bad[-1].reason}")

    def _stand_in(self, index: int) -> Any:
        """A target for the place of the sample *index*, which is not counted."""
        target = self.source.label(index)
        return self.transform.stand_in(target) if isinstance(self.transform, Steps) else target

    def _slot(self, request: Request) -> Tensor | None:
        if self.slots is None or request.slot is None:
            return None
        return self.slots.images(request.slot)[request.begin : request.begin + request.size]

    def _memory(self, request: Request, shape: tuple[int, ...]) -> Tensor:
        """For the images of a request, laid out pixel by pixel as decoders write them."""
        if (images := self._slot(request)) is not None:
            return images
        channels, height, width = shape
        return torch.empty(request.size, height, width, channels, dtype=torch.uint8).permute(0, 3, 1, 2)

    def _shape_of(self, opened: Sequence[object]) -> tuple[int, ...]:
        made = next((one.pixels for one in opened if isinstance(one, _Made)), None)
        if made is None:
            made, _ = self.transform(torch.zeros(self.source.channels, 8, 8, dtype=torch.uint8), self.source.label(0))
        return tuple(made.shape)

    def __getstate__(self) -> dict[str, Any]:
        try:
            return {"sent": dumps(vars(self))}
        except Exception as error:  # any that the source's parts raise
            raise UserError(
                f"{self.source.name}: it cannot be sent to worker processes ({one_line(error)}); make it without "
                "lambdas, open files and local classes, or use data.workers 0"
            ) from error

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(ForkingPickler.loads(state["sent"]))  # pyright: ignore[reportAttributeAccessIssue]


class _Made(NamedTuple):
    """What a transform made that cannot wait; like :class:`Begun`."""

    pixels: Tensor
    target: Any

    def fill(self, buffer: Tensor) -> None:
        made, first = tuple(self.pixels.shape), tuple(buffer.shape)
        if made != first:  # copying would repeat a row or a column
            raise UserError(f"the transform made images of {made} and {first} (C, H, W); let it return one size")
        buffer.copy_(self.pixels)

    def finish(self, buffer: Tensor) -> Any:
        return self.target


class _Taken(NamedTuple):
    opened: Begun | _Made | None
    """None where nothing could be read"""
    target: Any
    id: int


def _is_pixels(image: Any, channels: int) -> bool:
    return isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == channels


def _hint(image: Any) -> str:
    """How to make of *image* what is wanted."""
    if isinstance(image, np.ndarray):
        return "; use torch.from_numpy(array).permute(2, 0, 1)"
    if not isinstance(image, Tensor):
        return ""
    if image.dtype != torch.uint8:
        scaled = ", scale=True" if image.is_floating_point() else ""
        return f"; end it with torchvision's v2.ToDtype(torch.uint8{scaled}), and leave out ToTensor and Normalize"
    if image.ndim == 3 and image.shape[-1] in (1, 3):
        return "; it looks like (H, W, C): use permute(2, 0, 1)"
    return ""


class SharedMemory(mmap.mmap):
    """Bytes that a process which this is sent to maps too."""

    fd: int

    def __new__(cls, size: int, fd: int | None = None) -> SharedMemory:
        """Args: *fd*: of memory that another process made; by default new memory is made, all zeros."""
        if fd is None:
            fd = _anonymous_file()
            os.ftruncate(fd, max(size, 1))
        memory = super().__new__(cls, fd, max(size, 1))
        memory.fd = fd
        return memory

    def array(self) -> np.ndarray:
        """All of it, uint8. The memory lives as long as this array or a tensor made of it."""
        return np.frombuffer(self, dtype=np.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return _mapped, (DupFd(self.fd), len(self))

    def __del__(self) -> None:
        os.close(self.fd)


def _anonymous_file() -> int:
    try:
        return os.memfd_create("bigvision")
    except (AttributeError, OSError):  # not Linux, or forbidden in a sandbox
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


def _mapped(sent: Any, size: int) -> SharedMemory:
    return SharedMemory(size, sent.detach())


# Objects with tensors in them.


def dumps(value: Any) -> bytes:
    """*value* as multiprocessing sends it, but that tensors in it move to `SharedMemory`, where torch would use /dev/shm.

    A tensor is moved once, however often it is sent, and no second copy stays behind.
    """
    buffer = BytesIO()
    _Sender(buffer).dump(value)
    return buffer.getvalue()


class _Sender(ForkingPickler):
    def __init__(self, buffer: BytesIO) -> None:
        super().__init__(buffer, 5)
        self._left: dict[int, tuple[torch.UntypedStorage, SharedMemory]] = {}
        """By the address where tensors lay before: what they share, they share afterwards."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor or obj.device.type != "cpu" or obj.layout != torch.strided or obj.requires_grad:
            return NotImplemented
        view = obj.storage_offset(), obj.shape, obj.stride()
        return _tensor, (self._memory(obj, view), obj.dtype, *view)

    def _memory(self, tensor: Tensor, view: tuple[Any, ...]) -> SharedMemory:
        """Where *tensor* lies; the first time that it is sent, it is moved there."""
        storage = tensor.untyped_storage()
        if (memory := _moved.get(storage.data_ptr())) is not None:
            return memory
        if storage.data_ptr() not in self._left:
            memory = SharedMemory(storage.nbytes())
            torch.from_numpy(memory.array())[: storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)  # pyright: ignore[reportCallIssue, reportArgumentType]
            self._left[storage.data_ptr()] = storage, memory
        memory = self._left[storage.data_ptr()][1]
        moved = torch.from_numpy(memory.array()).untyped_storage()
        _moved[moved.data_ptr()] = memory
        tensor.set_(moved, *view)  # pyright: ignore[reportCallIssue, reportArgumentType]
        return memory


def _tensor(memory: SharedMemory, dtype: torch.dtype, *view: Any) -> Tensor:
    storage = torch.from_numpy(memory.array()).untyped_storage()
    return torch.empty(0, dtype=dtype).set_(storage, *view)  # pyright: ignore[reportCallIssue, reportArgumentType]


_moved: weakref.WeakValueDictionary[int, SharedMemory] = weakref.WeakValueDictionary()
"""By the address of the first byte."""


# The images of micro-batches.


class Slots:
    """Memory for images, uint8 (*size*, C, H, W) in each of *count* slots, which workers write and this process reads.

    A slot is free again when the last tensor that shows a part of its images is gone. New memory for each batch would be
    slower: the system has to clear each of its pages, map it twice and take it back.
    """

    def __init__(self, count: int, size: int, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        self._memory = SharedMemory(count * size * channels * height * width)
        self._shape = count, size, height, width, channels
        self._free = list(range(count))
        self._pinned: dict[int, Tensor] = {}
        self.key = next(_numbers)
        _slots[self.key] = self

    @property
    def nbytes(self) -> int:
        return len(self._memory)

    def take(self) -> int | None:
        """A free slot, the one used last where there are several; None when batches lie in all of them."""
        return self._free.pop() if self._free else None

    def images(self, slot: int) -> Tensor:
        """Where a worker writes."""
        return torch.from_numpy(self._array(slot)).permute(0, 3, 1, 2)

    def pin(self, slot: int, begin: int, stop: int) -> None:
        """Copy these samples of a slot to page-locked memory, which :meth:`received` then returns."""
        images = self.images(slot)
        if slot not in self._pinned:
            self._pinned[slot] = torch.empty_like(images, pin_memory=True)
        self._pinned[slot][begin:stop].copy_(images[begin:stop])

    def received(self, slot: int) -> Tensor:
        """What workers wrote; when this and all views of it are gone, the slot is free."""
        if slot in self._pinned:
            self._free.append(slot)
            return self._pinned.pop(slot)
        array = self._array(slot)
        # A tensor made of it keeps this very array, however many views there will be of the tensor.
        weakref.finalize(array, self._free.append, slot).atexit = False
        return torch.from_numpy(array).permute(0, 3, 1, 2)

    def _array(self, slot: int) -> np.ndarray:
        return self._memory.array().reshape(self._shape)[slot]

    def __getstate__(self) -> dict[str, object]:
        return {"_memory": self._memory, "_shape": self._shape, "key": self.key}


_numbers = itertools.count()
_slots: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()
