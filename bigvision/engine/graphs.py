"""CUDA graphs: the passes of a micro-batch are captured once, and then launched as a whole.

The kernels of a small model at a small batch take less time than the host needs to launch them. A graph holds the launches of
one forward pass, loss and backward pass, with the memory that each kernel reads and writes. So what changes from step to step
has to lie at the same addresses each time: samples, targets, mixing, the factor of the loss, the samples that drop path keeps,
and gradients. What is around the passes stays as it is: loading, clipping, the optimizer, the average of the weights.

Random numbers are those of a pass without a graph. torch lets a graph read seed and offset of the device's generator when it is
launched, and the engine seeds the generator in each step.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from bigvision.data.batch import Batch
from bigvision.errors import UserError
from bigvision.models.tracing import first_line
from bigvision.samples import each_tensor

T = TypeVar("T")
Passes = Callable[[Batch, "Tensor | float", "Tensor | float"], tuple[Tensor, Tensor]]
"""The passes of a micro-batch: from its samples, the factor of its gradients, and the scale of its loss for a teacher, to its
loss and which samples are finite. Gradients are added to those of the parameters."""

MOST_SHAPES = 4
"""Kinds of micro-batches that get graphs, at least: whole ones and the short last one, of two sizes of images."""
REHEARSALS = 3
"""Passes before a capture, in which libraries choose and load kernels, and blocks are compiled. torch's documentation asks for
three. The later ones add to the gradients of the first, as those of a step's later micro-batches do."""


class Recorder(Protocol):
    """Captures what is launched on a device."""

    def rehearse(self, work: Callable[[], object]) -> None:
        """Do *work* as it will be captured."""
        ...

    def capture(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        """Record what *work* launches, which is not executed; return what it returns, and a function that launches it.

        The memory of the tensors that it returns holds their values from a launch to the next one of any recording. All other
        memory that *work* has allocated is free again.
        """
        ...


class CudaGraphs:
    """Captures into `torch.cuda.CUDAGraph`. All graphs share one pool of memory, since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, work: Callable[[], object]) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def capture(self, work: Callable[[], T]) -> tuple[T, Callable[[], object]]:
        graph = torch.cuda.CUDAGraph()
        # The loader's thread pins memory, and a checkpoint's waits for its copies: both would end a capture in global mode.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            results = work()
        return results, graph.replay


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaGraphs}
"""By the kind of device. The CPU has no graphs; tests put an imitation here."""


@dataclass
class _Graph:
    """Captured passes."""

    loss: Tensor
    finite: Tensor
    launch: Callable[[], object]
    learned: list[nn.Parameter]
    """Parameters that have a gradient afterwards."""


@dataclass
class _Kind:
    """Micro-batches for which the same kernels are launched, and the memory that these read."""

    batch: Batch
    factor: Tensor
    scale: Tensor | float
    graphs: dict[tuple[bool, ...], _Graph] = field(default_factory=dict)
    """By which parameters have a gradient before: those of a step's first micro-batch are written, of others added."""

    def feed(self, batch: Batch, factor: Tensor | float, scale: Tensor | float) -> None:
        """Write what is new to the memory that the graphs read."""
        pairs = [*zip(_read(self.batch), _read(batch)), (self.factor, factor), (self.scale, scale)]
        for fixed, new in pairs:
            if isinstance(fixed, Tensor):
                if isinstance(new, Tensor):
                    fixed.copy_(new, non_blocking=True)
                else:
                    fixed.fill_(new)


class Graphs:
    """Runs the passes of micro-batches as graphs. Called as the passes are, it does the same, bit for bit.

    Gradients lie in memory of their own, which all graphs write, so that micro-batches of any kinds add up in a step.
    """

    def __init__(self, passes: Passes, parts: Sequence[nn.Module], device: torch.device, name: str, most: int) -> None:
        """*parts* are what *passes* run of the model *name*; *most* kinds of micro-batches get graphs."""
        self.passes, self.device, self.name, self.most = passes, device, name, max(most, MOST_SHAPES)
        self.recorder = RECORDERS[device.type](device)
        self.modules = [module for part in parts for module in part.modules()]
        self.parameters = [p for p in dict.fromkeys(p for part in parts for p in part.parameters()) if p.requires_grad]
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.kinds: dict[Any, _Kind] = {}
        self.full = False

    def __call__(self, batch: Batch, factor: Tensor | float, scale: Tensor | float) -> tuple[Tensor, Tensor]:
        kind = self._kind(batch, factor, scale)
        if kind is None:
            return self.passes(batch, factor, scale)
        kind.feed(batch, factor, scale)
        self._move_gradients()
        before = tuple([parameter.grad is not None for parameter in self.parameters])
        if before not in kind.graphs:
            kind.graphs[before] = self._captured(kind)
        graph = kind.graphs[before]
        graph.launch()
        for parameter in graph.learned:
            parameter.grad = self.gradients[parameter]
        # The next launch writes to the same memory, and these are read later.
        return graph.loss.clone(), graph.finite.clone()

    def _kind(self, batch: Batch, factor: Tensor | float, scale: Tensor | float) -> _Kind | None:
        """That of *batch*; None where there are too many already."""
        key = (
            _form(batch.images), repr(each_tensor(_form, batch.targets)), scale if isinstance(scale, float) else None,
            None if batch.mix is None else (batch.mix.apart, *map(_form, _mixing(batch))), len(batch),
        )  # fmt: skip
        if key not in self.kinds:
            if len(self.kinds) == self.most:
                if not self.full:
                    print(
                        f"warning: parallel.cuda_graphs: {self.most} kinds of micro-batches have graphs, and more run without: "
                        "use batches of fewer shapes",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                self.full = True
                return None
            kept = batch._map(torch.clone)
            fixed = torch.zeros((), dtype=torch.float64, device=self.device)
            kind = _Kind(kept, fixed, scale.clone() if isinstance(scale, Tensor) else scale)
            kind.feed(batch, factor, scale)
            self._rehearse(kind)
            self.kinds[key] = kind
        return self.kinds[key]

    def _rehearse(self, kind: _Kind) -> None:
        """Run the passes of *kind* before they are captured, and leave the state as it was."""
        given = [parameter.grad for parameter in self.parameters]
        live = [(buffer, buffer.clone()) for module in self.modules for buffer in module.buffers(recurse=False)]
        for parameter in self.parameters:
            parameter.grad = None

        def work() -> None:
            for _ in range(REHEARSALS):
                self.passes(kind.batch, kind.factor, kind.scale)

        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self.recorder.rehearse(work)
        with torch.no_grad():
            for buffer, values in live:
                buffer.copy_(values)
        found = {parameter: parameter.grad for parameter in self.parameters if parameter.grad is not None}
        new = {parameter: grad for parameter, grad in found.items() if parameter not in self.gradients}
        if new:
            self.gradients |= {parameter: torch.empty_like(grad) for parameter, grad in new.items()}
            torch._foreach_copy_([self.gradients[parameter] for parameter in new], list(new.values()))
        for parameter, grad in zip(self.parameters, given):
            parameter.grad = grad

    def _move_gradients(self) -> None:
        """Let gradients of passes without a graph lie where graphs add to them."""
        for parameter in self.parameters:
            grad, fixed = parameter.grad, self.gradients.get(parameter)
            if grad is None or grad is fixed:
                continue
            if fixed is None:
                self.gradients[parameter] = grad
            else:
                parameter.grad = fixed.copy_(grad)

    def _captured(self, kind: _Kind) -> _Graph:
        """The passes of *kind*, where parameters have the gradients that they have now, which it forgets."""

        def work() -> tuple[Tensor, Tensor]:
            results = self.passes(kind.batch, kind.factor, kind.scale)
            new = [p for p in self.parameters if p.grad is not None and p.grad is not self.gradients[p]]
            if new:
                torch._foreach_copy_([self.gradients[p] for p in new], [p.grad for p in new])  # type: ignore[misc]
            return results

        buffers = [dict(module._buffers) for module in self.modules]
        try:
            with _no_collection():
                (loss, finite), launch = self.recorder.capture(work)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise self._refusal(first_line(_cause(error))) from error
        for module, before in zip(self.modules, buffers):
            changed = [name for name, buffer in module._buffers.items() if buffer is not before.get(name)]
            if changed:
                raise self._refusal(f"{type(module).__name__} replaces its buffer {changed[0]}")
        return _Graph(loss, finite, launch, [parameter for parameter in self.parameters if parameter.grad is not None])

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"parallel.cuda_graphs: true, but the passes of {self.name} cannot be captured ({reason}): use false")


def _mixing(batch: Batch) -> list[Tensor]:
    return [] if batch.mix is None else [batch.mix.weight, batch.mix.box, batch.mix.share]


def _read(batch: Batch) -> list[Tensor]:
    """The tensors of *batch* that passes read, which are neither ids nor what is valid."""
    found: list[Tensor] = [batch.images, *_mixing(batch)]
    each_tensor(lambda tensor: found.append(tensor), batch.targets)
    return found


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.stride()


@contextmanager
def _no_collection() -> Any:
    """Python's garbage collector might free a device's event, which may not happen in a capture."""
    enabled = gc.isenabled()
    gc.disable()
    # A caller's autocast would keep weights that were cast in memory of a graph, or before it.
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        if enabled:
            gc.enable()


def _cause(error: Exception) -> Exception:
    """What *error* followed from: CUDA reports that a capture was broken off once more when it ends."""
    while isinstance(error.__context__, Exception) and "previous error during capture" in str(error):
        error = error.__context__
    return error
