"""CUDA graphs beside the CPU's operations, for tests without a GPU.

A capture runs its work once, writes down each operation of torch's with the very memory that it reads and writes, and then
makes undone what it did: as on CUDA, nothing was executed. A launch does the operations again in the same memory. What the work
read as a number of Python's is a constant of the graph; a tensor that it found somewhere is that memory for ever, whatever is
put in its place. Memory that the work has allocated is full of bytes of ones, which are NaN in every format, before the first
launch and between launches; only what the work returned keeps its values until the next launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bigvision.engine import graphs

T = TypeVar("T")
WAITS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "lift_fresh"}
"""Operations that wait for a device, or copy from memory of the host that is not pinned: CUDA ends a capture."""


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def contents(tensor: Tensor) -> Tensor:
    """The bytes of all memory of which *tensor* is a part."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())  # type: ignore[call-overload]


class Recording(TorchDispatchMode):
    """Operations with their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: dict[int, Tensor] = {}
        """What was allocated."""
        self.found: dict[int, tuple[Tensor, Tensor]] = {}
        """What was there and was written to, and its bytes before."""
        self.met: dict[int, Tensor] = {}
        """What was there and read, so that no new memory gets its address."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if name in WAITS:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            if storage(tensor) not in self.made:
                self.met.setdefault(storage(tensor), tensor.detach())
        for tensor in written(func, args, kwargs):
            if (key := storage(tensor)) not in self.made and key not in self.found:
                self.found[key] = tensor.detach(), contents(tensor).clone()
        # Its memory of now, also if the tensor gets another one later.
        kept_args, kept_kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        outputs = func(*args, **kwargs)
        results = [tensor.detach() for tensor in tensors_in(outputs)]
        for tensor in results:
            if (key := storage(tensor)) not in self.met:
                self.made.setdefault(key, tensor)
        self.operations.append((func, kept_args, kept_kwargs, results))
        return outputs


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The arguments that an operation writes to."""
    if func is torch.ops.aten.native_batch_norm.default:  # the schema conceals that running statistics are
        yield from tensors_in(args[3:5])
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = kwargs.get(argument.name) if place >= len(args) else args[place]
            yield from tensors_in(given)


class Graph:
    """What a capture has recorded."""

    def __init__(self, recording: Recording, results: Any) -> None:
        self.operations = recording.operations
        returned = {storage(tensor) for tensor in tensors_in(results)}
        self.lost = [tensor for key, tensor in recording.made.items() if key not in returned]
        self.launches = 0
        for tensor, before in recording.found.values():
            contents(tensor).copy_(before)
        for tensor in recording.made.values():
            contents(tensor).fill_(255)

    @torch.no_grad()
    def launch(self) -> None:
        self.launches += 1
        for func, args, kwargs, results in self.operations:
            for old, new in zip(results, tensors_in(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        for tensor in self.lost:
            contents(tensor).fill_(255)


class Imitation:
    """`bigvision.engine.graphs.Recorder` on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.graphs: list[Graph] = []
        self.rehearsals = 0

    def rehearse(self, work: Callable[[], object]) -> None:
        self.rehearsals += 1
        work()

    def capture(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        random = torch.get_rng_state()
        with Recording() as recording:
            results = work()
        torch.set_rng_state(random)
        self.graphs.append(Graph(recording, results))
        return results, self.graphs[-1].launch


@contextmanager
def on_the_cpu() -> Iterator[list[Imitation]]:
    """Let passes be captured on the CPU; yield what captures them meanwhile."""
    found: list[Imitation] = []

    def made(device: torch.device) -> Imitation:
        found.append(Imitation(device))
        return found[-1]

    graphs.RECORDERS["cpu"] = made
    try:
        yield found
    finally:
        del graphs.RECORDERS["cpu"]
