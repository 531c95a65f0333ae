"""Records a step without memory: the operations of each part's passes, and what is allocated and freed, in their order."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from bigvision.config import OptimConfig
from bigvision.models.alike import tensors_in
from bigvision.models.tracing import FUSED_ATTENTION, OpCounter
from bigvision.optim import allocate_state, build_optimizer
from bigvision.planning.operations import IMAGES, NOTHING, Amount, Log, Operation


@dataclass(frozen=True)
class Moment:
    """What is allocated at one moment of the passes, beside the state of the model."""

    fixed: float
    per_image: float
    gradients: float
    """Bytes of the parameters' gradients that the pass has completed so far."""


@dataclass(frozen=True)
class Span:
    """A part's pass, forward or backward."""

    part: int
    """Its place among the profile's parts."""
    backward: bool
    begin: Moment
    peaks: tuple[Moment, ...]
    """The moments of which one is the highest, whatever the micro-batch and whatever a gradient costs."""
    end: Moment


@dataclass
class Stretch:
    """What is done without interruption in one part's pass."""

    backward: bool
    place: int
    """The block n has the place 2 n + 1, and what is behind it 2 n + 2."""
    flops: Amount = NOTHING
    moved: Amount = NOTHING
    """Bytes."""
    again_flops: Amount = NOTHING
    """Of what was recomputed, which the two above leave out."""
    again_moved: Amount = NOTHING
    events: list[tuple[str, int]] = field(default_factory=list)
    """("allocate" | "free" | "gradient", number of the allocation)."""
    operations: list[Operation] = field(default_factory=list)
    offloaded: Amount = NOTHING
    """Bytes of activations that begin to leave for the host, or, backward, to come back."""


@dataclass
class Recording:
    """A forward and a backward pass."""

    sizes: list[Amount]
    """Bytes of each allocation."""
    stretches: list[Stretch]
    boundaries: dict[tuple[int, bool], float]
    """Bytes of what enters (False) and leaves (True) each block, for one image."""
    used: dict[str, int]
    """The place at which each tensor outside of blocks was used first."""

    def operations(self) -> dict[tuple[bool, int], list[Operation]]:
        """The operations by (backward, place)."""
        found: dict[tuple[bool, int], list[Operation]] = {}
        for one in self.stretches:
            found.setdefault((one.backward, one.place), []).extend(one.operations)
        return found


class Recorder(OpCounter):
    """Counts the operations of each part's passes, and records in their order what is allocated and freed."""

    loss: Tensor
    done = False

    def __init__(self, ignored: Iterable[Tensor], blocked: bool = False, many: bool = True) -> None:
        """Memory of the tensors *ignored* is left out.

        *blocked*: oneDNN computes convolutions in layouts of its own; *many*: it also computes those of 1 x 1.
        """
        super().__init__()
        self.blocked, self.many = blocked, many
        self.counted = self.moved = NOTHING
        """FLOPs and bytes of the stretch that goes on."""
        self.sizes: list[Amount] = []
        """Of each allocation."""
        self.stretches: list[Stretch] = []
        """Those that have ended."""
        self.stretch = Stretch(False, 0)
        """The one that goes on."""
        self.log = Log()
        self.fused = False
        """Whether what is computed now becomes part of another kernel, and gets no memory."""
        self.boundaries: dict[tuple[int, bool], float] = {}
        """Bytes of what enters (False) and leaves (True) each block, for one image."""
        self.watched: dict[int, str] = {}
        """Tensors outside of blocks that no operation has used yet, by their memory."""
        self.used: dict[str, int] = {}
        """The place at which each of them was used first."""
        self._alive: dict[int, tuple[int, Any]] = {}
        self._alive.update({tensor.untyped_storage()._cdata: (-1, None) for tensor in ignored})

    def enter(self, backward: bool, place: int) -> None:
        """The stretch so far ends; another one begins."""
        done = self.stretch
        done.flops, done.moved = self.counted - done.again_flops, self.moved - done.again_moved
        done.operations, self.log.operations = self.log.operations, []
        self.stretches.append(done)
        self.stretch, self.counted, self.moved = Stretch(backward, place), NOTHING, NOTHING

    def leave(self, block: int) -> None:
        """The backward pass of *block* is over."""
        # Where the same tensor left the block before, that one's pass has begun.
        if (self.stretch.backward, self.stretch.place) != (True, 2 * block - 1):
            self.enter(True, 2 * block)

    def finished(self) -> Recording:
        """What was recorded; what is freed from now on is left out."""
        self.done = True
        return Recording(self.sizes, self.stretches, self.boundaries, self.used)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """What is counted in here was, in a backward pass, counted before."""
        flops, moved, logged = self.counted, self.moved, len(self.log.operations)
        try:
            yield
        finally:
            if self.stretch.backward:
                self.stretch.again_flops += self.counted - flops
                self.stretch.again_moved += self.moved - moved
                del self.log.operations[logged:]

    def add(self, flops: float, moved: Sequence[float]) -> None:
        self.counted += Amount.of(flops)
        self.moved = sum(map(Amount.of, moved), self.moved)

    def attention(self, flops: float, moved: Sequence[float], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        super().attention(flops, moved, inputs, outputs)
        self.log.attention(flops, moved, inputs, outputs)

    def gradient(self, parameter: Tensor) -> None:
        """The gradient of *parameter* is complete."""
        assert parameter.grad is not None
        number, _ = self._alive.get(parameter.grad.untyped_storage()._cdata, (-1, None))
        if number >= 0:
            self.stretch.events.append(("gradient", number))

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch.compile would leave code alone that runs in any other mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watched:
            for leaf in tensors_in((args, kwargs)):
                if (name := self.watched.pop(leaf.untyped_storage()._cdata, None)) is not None:
                    self.used[name] = self.stretch.place
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.blocked and func is torch.ops.aten.native_batch_norm.default and args[0].shape[2:] == (1, 1):
            # The kernel returns maps of a single pixel row by row; fake ones would stay channels_last, and what follows them.
            result = (result[0].as_strided(result[0].shape, (result[0].shape[1], 1, 1, 1)), *result[1:])
        if func is not FUSED_ATTENTION.default:  # which `attention` has logged
            self.log.add(func, args, kwargs, result)
        outputs = iter(result if isinstance(result, (tuple, list)) else (result,))
        for copies, output in zip(self._blocked_copies(func, args, result), outputs):
            # Of the operands and, the last, of what becomes the next output.
            numbers = [self._allocate(size) for size in copies]
            for number in numbers[:-1]:
                self._free(number)
            for leaf in tensors_in(output):
                self._allocated(leaf.untyped_storage())
            self._free(numbers[-1])
        for leaf in tensors_in(list(outputs)):
            self._allocated(leaf.untyped_storage())
        return result

    def _blocked_copies(self, func: Any, args: Any, result: Any) -> Iterator[tuple[int, ...]]:
        """Bytes of what oneDNN copies for each output of a convolution: into its blocks of 16 channels, and out of them."""
        backward = func is torch.ops.aten.convolution_backward.default
        if not self.blocked or not (backward or func is torch.ops.aten.convolution.default):
            return
        images, weight = args[1:3] if backward else args[:2]
        stride, _, dilation, transposed, _, groups = args[4:10] if backward else args[3:9]
        plain = weight.shape[2:].numel() == 1 and set(stride) == set(dilation) == {1}
        if transposed or images.ndim != 4 or (plain and not self.many):
            return
        output = args[0] if backward else result
        if suggest_memory_format(images) == torch.channels_last:
            # Only weights are laid out anew. Of a depthwise convolution as many gradients of the weight are added up.
            yield (2 * weight.nbytes,)
            yield ((256 if groups == images.shape[1] > 1 else 1) * weight.nbytes,)
            return
        few = images.shape[1] <= 3  # they are read as they are
        pixels = 0 if few else images.nbytes
        if not backward:
            yield pixels, weight.nbytes, output.nbytes
            return
        yield (output.nbytes, weight.nbytes, images.nbytes) if result[0] is not None else (0,)
        yield (output.nbytes, pixels, weight.nbytes) if result[1] is not None else (0,)

    def _allocate(self, size: int) -> int:
        self.sizes.append(Amount.of(size))
        self.stretch.events.append(("allocate", len(self.sizes) - 1))
        return len(self.sizes) - 1

    def _free(self, number: int) -> None:
        self.stretch.events.append(("free", number))

    def _allocated(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        number = self._allocate(0 if self.fused else storage.nbytes())

        def freed(_: Any) -> None:
            self._alive.pop(key, None)
            if not self.done:
                self._free(number)

        self._alive[key] = number, weakref.ref(storage, freed)


class Counted:
    """The host's memory for offloaded activations, of which only the bytes are counted; see `bigvision.models.offload`."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None

    def leave(self, sources: Sequence[Tensor]) -> tuple[list[int], None]:
        return [self._counted(source.untyped_storage().nbytes()) for source in sources], None

    def bring(self, copies: Sequence[int]) -> tuple[list[Tensor], None]:
        return [torch.empty(self._counted(size), dtype=torch.uint8) for size in copies], None

    def wait(self, event: None) -> None: ...

    def free(self, copy: int) -> None: ...

    def _counted(self, size: int) -> int:
        if self.recorder is not None:
            self.recorder.stretch.offloaded += Amount.of(size)
        return size


def step_bytes(groups: list[dict[str, Any]], optim: OptimConfig) -> int:
    """Bytes that a step of the parameters in *groups*, on meta, allocates beside gradients and state."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = build_optimizer(groups, optim)
    allocate_state(optimizer)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    recorder = Recorder([*parameters, *(parameter.grad for parameter in parameters), *tensors_in(dict(optimizer.state))])
    with torch.no_grad(), recorder:
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
    now = most = 0.0
    for kind, number in recorder.stretch.events:
        now += recorder.sizes[number].at(IMAGES) * (1 if kind == "allocate" else -1)
        most = max(most, now)
    return round(most)


def spans(recording: Recording, index: Mapping[int, int]) -> Iterator[Span]:
    """The passes of all parts in their order; *index* has the number of the part at each place."""
    now, gradients = Moment(0.0, 0.0, 0.0), set[int]()
    for stretch in recording.stretches:
        begin, peaks = now, [now]
        for kind, number in stretch.events:
            size = recording.sizes[number]
            if kind == "gradient":
                if number not in gradients:
                    gradients.add(number)
                    now = Moment(now.fixed - size.fixed, now.per_image, now.gradients + size.fixed)
            else:
                sign = 1 if kind == "allocate" else -1
                if number in gradients:
                    now = Moment(now.fixed, now.per_image, now.gradients + sign * size.fixed)
                else:
                    now = Moment(now.fixed + sign * size.fixed, now.per_image + sign * size.per_image, now.gradients)
            if kind != "free":
                peaks.append(now)
        yield Span(index[stretch.place], stretch.backward, begin, tuple(highest(peaks)), now)


def highest(moments: Iterable[Moment]) -> list[Moment]:
    """Those that no other one exceeds in all respects."""
    found: list[Moment] = []
    for one in sorted(set(moments), key=lambda m: (m.per_image, m.fixed, m.gradients), reverse=True):
        if not any(o.fixed >= one.fixed and o.per_image >= one.per_image and o.gradients >= one.gradients for o in found):
            found.append(one)
    return found
