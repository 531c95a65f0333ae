"""Offload of activations: what a block keeps for its backward pass waits in host memory, and is back one block ahead.

Autograd hands over each tensor that it saves in a block (``torch.autograd.graph.saved_tensors_hooks``) and gets it back in the
backward pass. What a block has saved is copied out, on a stream of its own, while the next block runs, and its memory on the
device is free when the block after that begins. So the last block of a micro-batch, whose backward pass comes at once, stays.
When a block's backward pass begins, what the block before it has saved is copied back. The values are copied bit for bit.

What stays on the device: parameters, buffers, views of both and weights that were cast for computing; tensors below `LEAST`
bytes; memory of which a block has saved less than half, which is somebody else's. Memory that several tensors share moves once.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bigvision.errors import UserError

LEAST = 256 << 10
"""Bytes below which memory stays on the device. To launch a copy takes the host about 10 microseconds, in which PCIe 4 moves as
much; what is smaller (norms' statistics, a class token) is a few thousandths of a block's activations."""
SLAB = 64 << 20
"""Bytes of pinned memory that are asked for at a time. torch rounds each request up to a power of two, which this is."""
ALIGNED = 512
WEIGHT_CHAIN = 4
"""Operations between a weight and what a product saves of it: a cast, a layout, a view."""

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]
"""What autograd keeps instead of a tensor, and the tensor again."""


class Transfers(Protocol):
    """Copies between a device and its host, beside what the device computes."""

    def leave(self, sources: Sequence[Tensor]) -> tuple[list[Any], Any]:
        """Begin to copy the whole memory of each of *sources*, which stays until the event that is returned has come."""
        ...

    def bring(self, copies: Sequence[Any]) -> tuple[list[Tensor], Any]:
        """Begin to copy back; return bytes on the device, which nobody reads before the event."""
        ...

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for *event*."""
        ...

    def free(self, copy: Any) -> None:
        """*copy* is not needed any longer; what was begun with it may still go on."""
        ...


class PinnedCopies:
    """Copies into pinned host memory, on one stream: each waits for what was computed before, and for the copies before it.

    Nothing needs ``record_stream``. What leaves is kept until the computing stream has waited for its copy. What comes back
    gets memory of the computing stream, which waits for it before it reads or frees it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.buffers = Buffers(functools.partial(torch.empty, dtype=torch.uint8, pin_memory=True))

    def leave(self, sources: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        wholes = [whole(source) for source in sources]
        hosts = [self.buffers.take(source.numel()) for source in wholes]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for host, source in zip(hosts, wholes):
                host.copy_(source, non_blocking=True)
        return hosts, self.stream.record_event()

    def bring(self, copies: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        targets = [torch.empty(host.numel(), dtype=torch.uint8, device=self.device) for host in copies]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for target, host in zip(targets, copies):
                target.copy_(host, non_blocking=True)
        return targets, self.stream.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def free(self, copy: Tensor) -> None:
        # The next copy into it is of the same stream, so it waits for those that still read it.
        self.buffers.give(copy)


class Buffers:
    """Bytes of large slabs. When all are given back, they are handed out from the beginning again."""

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self.allocate = allocate
        self.slabs: list[Tensor] = []
        self.used: list[int] = []
        """Bytes of each slab that are handed out or were given back."""
        self.idle: dict[int, list[Tensor]] = {}
        """What was given back, by size."""
        self.out = 0

    def take(self, size: int) -> Tensor:
        if not self.out:
            self.used, self.idle = [0] * len(self.slabs), {}
        self.out += 1
        if idle := self.idle.get(size):
            return idle.pop()
        place = next((n for n, slab in enumerate(self.slabs) if slab.numel() - self.used[n] >= size), len(self.slabs))
        if place == len(self.slabs):
            wanted = max(SLAB, size)
            try:
                self.slabs.append(self.allocate(wanted))
            except RuntimeError as error:
                held = sum(slab.numel() for slab in self.slabs) / 2**30
                raise UserError(
                    f"parallel.offload: activations has {held:.1f} GiB of pinned host memory and gets no more ({error}): use a "
                    "smaller train.micro_batch, or parallel.recompute too"
                ) from error
            self.used.append(0)
        begin = self.used[place]
        self.used[place] += -(-size // ALIGNED) * ALIGNED
        return self.slabs[place][begin : begin + size]

    def give(self, buffer: Tensor) -> None:
        self.out -= 1
        self.idle.setdefault(buffer.numel(), []).append(buffer)


TRANSFERS: dict[str, Callable[[torch.device], Transfers]] = {"cuda": PinnedCopies}
"""By the kind of device. The CPU has no other memory; tests put an imitation here."""


class _Memory:
    """The memory of saved tensors. It lives as long as autograd keeps one of them."""

    def __init__(self, source: Tensor, transfers: Transfers) -> None:
        self.transfers = transfers
        self.here: Tensor | None = source
        """On the device: one of the tensors, or, where it came back, all of its bytes."""
        self.version: int | None = source._version
        """Of *source*; None where the bytes are a copy's."""
        self.copy: Any = None
        self.arriving: Any = None
        """The event behind which its bytes are there."""
        self.changed = False
        self.views: set[Any] = set()
        self.storage = weakref.ref(source.untyped_storage())
        """That of *source*, whose address another one gets when it is gone."""

    def ours(self) -> bool:
        """Whether enough of it was saved that it is worth to be moved."""
        assert self.here is not None
        saved = sum(shape.numel() * dtype.itemsize for dtype, shape, *_ in self.views)
        return 2 * saved >= self.here.untyped_storage().nbytes()

    def check(self) -> None:
        """Find out whether somebody has written to what autograd saved."""
        if self.version is not None and self.here is not None:
            self.changed = self.changed or self.here._version != self.version

    def __del__(self) -> None:
        if self.arriving is not None:  # else its memory might be given away before the copy has written to it
            self.transfers.wait(self.arriving)
        if self.copy is not None:
            self.transfers.free(self.copy)


class _Group:
    """What one block saved in one forward pass. Autograd's handles keep it alive."""

    def __init__(self, before: _Group | None, weights: set[int]) -> None:
        while before is not None and not before.memories:
            before = before.before
        self._before = weakref.ref(before) if before is not None else None
        self.weights = weights
        """The addresses of the block's parameters and buffers."""
        self.memories: dict[int, weakref.ref[_Memory]] = {}
        self.entered = False
        self.left: Any = None
        """The event behind its copies to the host."""
        self.leaving: list[weakref.ref[_Memory]] = []

    @property
    def before(self) -> _Group | None:
        return self._before() if self._before is not None else None

    def leave(self, transfers: Transfers) -> None:
        """Begin to copy to the host what is still needed."""
        if self.entered:
            return
        found = [m for m in alive(self.memories.values()) if m.copy is None and m.here is not None and m.ours()]
        for memory in found:
            memory.check()
        found = [memory for memory in found if not memory.changed]
        if found:
            copies, self.left = transfers.leave([memory.here for memory in found if memory.here is not None])
            for memory, copy in zip(found, copies):
                memory.copy = copy
            self.leaving = [weakref.ref(memory) for memory in found]

    def release(self, transfers: Transfers) -> None:
        """Free the device's memory of what `leave` has copied, unless its backward pass has begun."""
        found, self.leaving = list(alive(self.leaving)) if not self.entered else [], []
        if found:
            transfers.wait(self.left)
        for memory in found:
            memory.check()
            memory.here = None

    def bring(self, transfers: Transfers) -> None:
        """Begin to copy back what is not on the device."""
        found = [memory for memory in alive(self.memories.values()) if memory.here is None]
        if found:
            arrived, event = transfers.bring([memory.copy for memory in found])
            for memory, here in zip(found, arrived):
                memory.here, memory.version, memory.arriving = here, None, event


class _Saved:
    """Which part of which memory a tensor is: what autograd keeps instead of it."""

    __slots__ = ("group", "memory", "view")

    def __init__(self, group: _Group, memory: _Memory, view: Any) -> None:
        self.group, self.memory, self.view = group, memory, view


def whole(tensor: Tensor) -> Tensor:
    """The bytes of all memory of which *tensor* is a part."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def view(here: Tensor, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
    """A tensor in the memory of *here*: another part of it, or its bytes as another type."""
    if here.dtype == torch.uint8 and here.numel() == here.untyped_storage().nbytes() and here.numel() % dtype.itemsize == 0:
        here = here.view(-1).view(dtype)
    if here.dtype == dtype:
        return here.as_strided(shape, stride, offset)
    empty = torch.empty(0, dtype=dtype, device=here.device)
    return empty.set_(here.untyped_storage(), offset, shape, stride)  # type: ignore[call-overload]


def alive(refs: Iterable[weakref.ref[_Memory]]) -> list[_Memory]:
    return [memory for ref in refs if (memory := ref()) is not None]


class Offload:
    """Moves what some blocks of a model save. Their forward passes may follow each other in any order, as in pipelines."""

    def __init__(
        self, device: torch.device, around: Hooks | None = None, transfers: Transfers | None = None, least: int | None = None
    ) -> None:  # fmt: skip
        """*around*: the hooks of autograd under which the model runs, for what stays on the device. *least*: in place of
        `LEAST`."""
        self.device, self.least = device, LEAST if least is None else least
        self.kinds: tuple[type[Tensor], ...] = (Tensor,)
        """A subclass has memory of another kind."""
        self.keep, self.kept = around or (Tensor.detach, lambda kept: kept)
        self.transfers = transfers or TRANSFERS[device.type](device)
        self.now: _Group | None = None
        """Of the block whose forward pass was the last to begin."""
        self.last: _Group | None = None
        """Of the block before it, whose copies may be under way."""
        self.known: dict[tuple[int, int], weakref.ref[_Memory]] = {}
        """The memory of saved tensors by address and version."""

    def wrap(self, block: nn.Module) -> None:
        """Let *block* offload what it saves, in place. Do it last, around recompute and compiled code."""
        block.forward = functools.partial(self._forward, block, block.forward)

    def _forward(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self.last is not None:
            self.last.release(self.transfers)
        if self.now is not None:
            self.now.leave(self.transfers)
        weights = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *block.buffers())}
        self.last, self.now = self.now, _Group(self.now, weights)
        with saved_tensors_hooks(self._pack, self._unpack):
            return forward(*args, **kwargs)

    def _pack(self, tensor: Tensor) -> Any:
        kept, group = self.keep(tensor), self.now
        assert group is not None
        if type(kept) not in self.kinds or kept.device.type != self.device.type or isinstance(tensor, nn.Parameter):
            return kept
        storage = kept.untyped_storage()
        if storage.nbytes() < self.least or storage._cdata in group.weights or _is_weight(tensor):
            return kept
        key = storage._cdata, kept._version
        memory = known() if (known := self.known.get(key)) is not None else None
        if memory is None or memory.storage() is not storage:
            memory = _Memory(kept, self.transfers)
            self.known[key] = weakref.ref(memory, functools.partial(self._forget, key))
        view = kept.dtype, kept.shape, kept.stride(), kept.storage_offset()
        memory.views.add(view)
        group.memories[id(memory)] = weakref.ref(memory)
        return _Saved(group, memory, view)

    def _forget(self, key: tuple[int, int], memory: weakref.ref[_Memory]) -> None:
        if self.known.get(key) is memory:
            del self.known[key]

    def _unpack(self, saved: Any) -> Tensor:
        if not isinstance(saved, _Saved):
            return self.kept(saved)
        group, memory = saved.group, saved.memory
        if not group.entered:
            group.entered = True
            group.bring(self.transfers)
            if group.before is not None:
                group.before.bring(self.transfers)
        if memory.here is None:
            group.bring(self.transfers)
        memory.check()
        if memory.changed:
            raise RuntimeError("a tensor that a backward pass needs was changed in place after the forward pass had saved it")
        if memory.arriving is not None:
            self.transfers.wait(memory.arriving)
            memory.arriving = None
        assert memory.here is not None
        return view(memory.here, *saved.view)


def _is_weight(tensor: Tensor) -> bool:
    """Whether *tensor* is made of one parameter alone: cast, transposed or laid out for a product."""
    node = tensor.grad_fn
    for _ in range(WEIGHT_CHAIN):
        before = [one for one, _ in node.next_functions if one is not None] if node is not None else []
        if len(before) != 1:
            return False
        node = before[0]
        if (variable := getattr(node, "variable", None)) is not None:
            return isinstance(variable, nn.Parameter)
    return False
