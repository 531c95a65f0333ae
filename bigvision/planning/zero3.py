"""What ZeRO-3 gathers in a micro-batch, and what it has gathered while each part runs.

DeepSpeed's `PartitionedParameterCoordinator` fetches what a module needs and, as far as its limits go, what is used next; it
frees what a module has used, unless that is used again soon. What it has fetched ahead when the passes turn is not gathered
again. Several weights are gathered into one flat buffer and copied out of it; the buffer stays until the last of them was used,
so that they are there twice for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from bigvision.planning.profile import Profile, StateTensor

Event = tuple[bool, str, bool]
"""Whether a module is entered or left, its path, and whether that is in the backward pass."""


@dataclass(frozen=True)
class Gathered:
    sizes: dict[tuple[bool, int], float]
    """Bytes that are gathered, with their padding, by (whether in the backward pass, part)."""
    held: list[float]
    """Bytes of gathered weights, and of the buffers that they arrive in, at the most in each span of the profile."""


def gathered(profile: Profile, ranks: int, knobs: Mapping[str, int], recomputed: bool) -> Gathered:
    """*knobs* are DeepSpeed's sizes; *recomputed* blocks run forward once more in the backward pass.

    Modules are taken in the order of their names in the model, which is that of their calls in most models.
    """
    numbers = range(len(profile.parts))
    found = Gathered({(back, part): 0.0 for back in (False, True) for part in numbers}, [0.0] * len(profile.spans))
    if ranks == 1:  # a rank alone computes with the share that it holds
        return found
    part_of = {tensor.name: number for number, part in enumerate(profile.parts) for tensor in part.tensors}
    place_of = {(span.backward, span.part): place for place, span in enumerate(profile.spans)}
    modules: dict[str, list[StateTensor]] = {}
    for tensor in (tensor for tensor in profile.tensors if not tensor.buffer):
        modules.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    trained = {path for path, weights in modules.items() if any(weight.trained for weight in weights)}
    events = _events(list(modules), trained, [part.path for part in profile.parts if part.path and recomputed])
    # gloo gathers into memory of its own, and copies what it has.
    copies = 2 if profile.device == "cpu" else 1
    inside: dict[str, list[int]] = {}
    """The parts with weights of each module and of those that it holds."""
    for path, weights in modules.items():
        for outer in with_outer(path):
            inside.setdefault(outer, []).append(part_of[weights[0].name])
    coordinator = _Coordinator([modules[path] for enters, path, _ in events if enters], ranks, knobs, copies)
    for enters, path, backward in events:
        if not enters:
            coordinator.release(modules[path])
            continue
        fetched, most = coordinator.fetch(modules[path])
        for weight in fetched:
            found.sizes[backward, part_of[weight.name]] += padded(weight, ranks)
        # A module that holds others is entered before the first of them, in the backward pass before the last of them.
        place = place_of.get((backward, max(inside[path]) if backward else min(inside[path])))
        if place is not None:
            found.held[place] = max(found.held[place], most)
    return found


def in_shares(numel: int, ranks: int) -> int:
    """Elements of a parameter in *ranks* equal shares, of which the last ones are padded."""
    return -(-numel // ranks) * ranks


def padded(weight: StateTensor, ranks: int) -> int:
    """Bytes of a weight in equal shares, in the type in which it is multiplied."""
    return in_shares(weight.numel, ranks) * weight.computes.itemsize


def _within(path: str, outer: str) -> bool:
    return not outer or path == outer or path.startswith(f"{outer}.")


def with_outer(path: str) -> list[str]:
    """*path* and the paths of the modules around it, the model's last."""
    names = path.split(".") if path else []
    return [".".join(names[:depth]) for depth in range(len(names), -1, -1)]


def _events(paths: Sequence[str], trained: Collection[str], again: Sequence[str]) -> list[Event]:
    """How the passes enter and leave the modules at *paths*, in the order of their calls.

    One that holds others is entered before them and left after them. The backward pass goes back to the first *trained* one.
    The blocks *again* run forward once more when the backward pass has entered the last of their modules.
    """

    known, order = set(paths), dict[str, None]()
    for path in paths:
        order.update(dict.fromkeys(one for one in reversed(with_outer(path)) if one in known))
    forward: list[Event] = []
    inside: list[str] = []
    for path in order:
        while inside and not _within(path, inside[-1]):
            forward.append((False, inside.pop(), False))
        inside.append(path)
        forward.append((True, path, False))
    forward += [(False, path, False) for path in reversed(inside)]
    first = next((place for place, path in enumerate(order) if path in trained), len(order))
    reached = {path for place, path in enumerate(order) if place >= first or any(_within(inner, path) for inner in trained)}
    found, entered = list(forward), set[str]()
    for enters, path, _ in reversed(forward):
        if path not in reached:
            continue
        found.append((not enters, path, True))
        block = next((block for block in again if _within(path, block)), None)
        if block is not None and block not in entered:
            entered.add(block)
            found += [(one, other, True) for one, other, _ in forward if _within(other, block)]
    return found


@dataclass
class _Buffer:
    """Weights that travel together."""

    size: float
    """Bytes of the flat buffer."""
    waiting: dict[str, int]
    """Those of them that nothing has used yet, with their bytes."""
    copied: bool = False


@dataclass
class _Coordinator:
    """DeepSpeed's PartitionedParameterCoordinator with a complete trace, without values."""

    trace: Sequence[Sequence[StateTensor]]
    """The weights of each module that is entered, in that order."""
    ranks: int
    knobs: Mapping[str, int]
    copies: int
    """Of what travels."""
    queue: deque[tuple[int, StateTensor]] = field(init=False)
    """What is fetched next: (step, weight)."""
    known: dict[str, int] = field(default_factory=dict)
    """The last step for which each weight was fetched, or found to be there when others were prefetched."""
    whole: dict[str, int] = field(default_factory=dict)
    """Bytes of the weights that are there."""
    travelling: dict[str, _Buffer] = field(default_factory=dict)
    """How each weight that was gathered and not used yet came."""
    available: int = 0
    """Elements that are there or on their way."""
    step: int = 0
    """How many modules were entered."""

    def __post_init__(self) -> None:
        self.queue = deque((step, weight) for step, weights in enumerate(self.trace) for weight in weights)

    def fetch(self, weights: Sequence[StateTensor]) -> tuple[list[StateTensor], float]:
        """The next module is about to run: what is gathered now, and the most bytes of weights that are there meanwhile."""
        needed = self._gather(weights)
        for weight in weights:
            self._arrive(weight)
        arrived = self._bytes()
        for weight in weights:
            if (buffer := self.travelling.pop(weight.name, None)) is not None:
                del buffer.waiting[weight.name]
        missing = {weight.name for weight in weights if self.known.get(weight.name, -1) < self.step}
        while missing and self.queue:
            at, weight = self.queue.popleft()
            self.known[weight.name] = at
            missing.discard(weight.name)
        limit = min(self.knobs["stage3_max_live_parameters"] - self.available, self.knobs["stage3_prefetch_bucket_size"])
        ahead: dict[str, StateTensor] = {}
        elements = 0
        while self.queue and elements < limit:
            at, weight = self.queue.popleft()
            self.known[weight.name] = max(self.known.get(weight.name, -1), at)
            if self._apart(weight) and weight.name not in ahead:
                ahead[weight.name] = weight
                elements += weight.numel
        coming = self._gather(list(ahead.values()))
        self.step += 1
        copied = (self.copies - 1) * sum(padded(weight, self.ranks) for weight in coming)
        return needed + coming, max(arrived, self._bytes() + copied)

    def release(self, weights: Sequence[StateTensor]) -> None:
        """A module has run: free its *weights* unless they are needed soon."""
        soon: set[str] = set()
        passed = 0
        for following in self.trace[self.step :]:
            if passed >= self.knobs["stage3_max_reuse_distance"]:
                break
            soon |= {weight.name for weight in following}
            passed += sum(weight.numel for weight in following)
        for weight in weights:
            if weight.name not in soon and self.known.get(weight.name, -1) <= self.step and weight.name in self.whole:
                del self.whole[weight.name]
                self.available -= weight.numel

    def _apart(self, weight: StateTensor) -> bool:
        """Whether each rank has a share of it alone. Small ones are kept whole."""
        small = weight.numel <= self.knobs["stage3_param_persistence_threshold"]
        return not small and weight.name not in self.whole and weight.name not in self.travelling

    def _gather(self, weights: Sequence[StateTensor]) -> list[StateTensor]:
        """Gather those of *weights* that are not there; return them."""
        apart = [weight for weight in weights if self._apart(weight)]
        self.available += sum(weight.numel for weight in apart)
        if len(apart) == 1:  # gathered in place
            self.whole[apart[0].name] = padded(apart[0], self.ranks)
        elif apart:
            sizes = {weight.name: weight.numel * weight.computes.itemsize for weight in apart}
            buffer = _Buffer(sum(padded(weight, self.ranks) for weight in apart), sizes)
            self.travelling |= {weight.name: buffer for weight in apart}
        return apart

    def _arrive(self, weight: StateTensor) -> None:
        """Copy all weights that came with *weight* out of their buffer."""
        buffer = self.travelling.get(weight.name)
        if buffer is None or buffer.copied:
            return
        buffer.copied = True
        self.whole |= buffer.waiting

    def _bytes(self) -> float:
        buffers = {id(buffer): buffer.size for buffer in self.travelling.values()}
        return sum(self.whole.values()) + sum(buffers.values())
