"""What ZeRO-3 has gathered while each part runs: the rules by which DeepSpeed fetches, prefetches and releases weights.

Weights of several tensors are gathered into one flat buffer and copied out of it; the buffer stays until the last of them was
used, so that they are there twice for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from bigvision.planning.profile import Part, Profile, StateTensor


@dataclass(frozen=True)
class _Use:
    """One module's pass."""

    span: int
    """The place of the pass among the profile's spans."""
    weights: tuple[StateTensor, ...]
    """The module's own, but those that are kept whole."""


@dataclass
class _Gather:
    """Weights that travel together."""

    buffer: float
    """Bytes of the flat buffer."""
    waiting: set[str]
    """Those of them that nothing has used yet."""
    copied: bool = False


def gathered(profile: Profile, ranks: int, knobs: Mapping[str, int], recomputed: bool) -> list[float]:
    """Bytes of gathered weights, and of the buffers that they arrive in, at the most in each span of *profile*.

    *knobs* are DeepSpeed's sizes; *recomputed* blocks run forward once more in the backward pass.
    """
    most = [0.0] * len(profile.spans)
    if ranks == 1:  # a rank alone computes with the share that it holds
        return most
    trace = list(_trace(profile, knobs["stage3_param_persistence_threshold"], recomputed))
    # gloo gathers into memory of its own, and copies what it has.
    coordinator = _Coordinator(trace, ranks, knobs, 2 if profile.device == "cpu" else 1)
    for step, use in enumerate(coordinator.trace):
        most[use.span] = max(most[use.span], *coordinator.fetch(step))
        coordinator.release(step)
    return most


def _trace(profile: Profile, threshold: int, recomputed: bool) -> Iterator[_Use]:
    """The passes of all modules with weights, in their order."""
    for place, span in enumerate(profile.spans):
        part = profile.parts[span.part]
        modules = list(_modules(part, threshold))
        if span.backward:
            again = modules if recomputed and part.path else []
            modules = [*again, *reversed(modules)]
        yield from (_Use(place, weights) for weights in modules)


def _modules(part: Part, threshold: int) -> Iterator[tuple[StateTensor, ...]]:
    """The parameters of *part* by module, in the order in which they are registered, which stands for that of their use."""
    found: dict[str, list[StateTensor]] = {}
    for tensor in part.tensors:
        if not tensor.buffer and tensor.numel > threshold:
            found.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    return (tuple(tensors) for tensors in found.values())


@dataclass
class _Coordinator:
    """DeepSpeed's PartitionedParameterCoordinator with a complete trace, without values."""

    trace: Sequence[_Use]
    ranks: int
    knobs: Mapping[str, int]
    copies: int
    """Of what travels."""
    sizes: dict[str, float] = field(init=False)
    """Bytes of each weight."""
    queue: deque[tuple[int, StateTensor]] = field(init=False)
    """What is fetched next: (step, weight)."""
    known: dict[str, int] = field(default_factory=dict)
    """The last step for which each weight was fetched, or found to be there when others were prefetched."""
    whole: dict[str, float] = field(default_factory=dict)
    """Bytes of the weights that are there."""
    travelling: dict[str, _Gather] = field(default_factory=dict)
    """How each weight that was gathered and not used yet came."""
    available: int = 0
    """Elements that are there or on their way."""

    def __post_init__(self) -> None:
        self.sizes = {one.name: one.numel * one.computes.itemsize for use in self.trace for one in use.weights}
        self.queue = deque((step, weight) for step, use in enumerate(self.trace) for weight in use.weights)

    def fetch(self, step: int) -> tuple[float, float]:
        """The module of *step* is about to run: bytes when its weights have arrived, and when others are on their way."""
        weights = self.trace[step].weights
        self._gather([weight for weight in weights if not self._there(weight)])
        for weight in weights:
            self._arrive(weight)
        arrived = self._bytes()
        for weight in weights:
            if (gather := self.travelling.pop(weight.name, None)) is not None:
                gather.waiting.discard(weight.name)
        missing = {weight.name for weight in weights if self.known.get(weight.name, -1) < step}
        while missing and self.queue:
            at, weight = self.queue.popleft()
            self.known[weight.name] = at
            missing.discard(weight.name)
        limit = min(self.knobs["stage3_max_live_parameters"] - self.available, self.knobs["stage3_prefetch_bucket_size"])
        coming: dict[str, StateTensor] = {}
        while self.queue and sum(weight.numel for weight in coming.values()) < limit:
            at, weight = self.queue.popleft()
            self.known[weight.name] = max(self.known.get(weight.name, -1), at)
            if not self._there(weight):
                coming[weight.name] = weight
        self._gather(list(coming.values()))
        return arrived, self._bytes() + (self.copies - 1) * sum(map(self._padded, coming.values()))

    def release(self, step: int) -> None:
        """The module of *step* has run: free its weights unless they are needed soon."""
        soon: set[str] = set()
        passed = 0
        for use in self.trace[step + 1 :]:
            if passed >= self.knobs["stage3_max_reuse_distance"]:
                break
            soon |= {weight.name for weight in use.weights}
            passed += sum(weight.numel for weight in use.weights)
        for weight in self.trace[step].weights:
            if weight.name not in soon and self.known.get(weight.name, -1) <= step + 1 and weight.name in self.whole:
                del self.whole[weight.name]
                self.available -= weight.numel

    def _there(self, weight: StateTensor) -> bool:
        return weight.name in self.whole or weight.name in self.travelling

    def _gather(self, weights: Sequence[StateTensor]) -> None:
        self.available += sum(weight.numel for weight in weights)
        if len(weights) == 1:  # gathered in place
            self.whole[weights[0].name] = self._padded(weights[0])
        elif weights:
            gather = _Gather(sum(map(self._padded, weights)), {weight.name for weight in weights})
            self.travelling |= {weight.name: gather for weight in weights}

    def _padded(self, weight: StateTensor) -> float:
        return -(-weight.numel // self.ranks) * self.ranks * weight.computes.itemsize

    def _arrive(self, weight: StateTensor) -> None:
        """Copy all weights that came with *weight* out of their buffer."""
        gather = self.travelling.get(weight.name)
        if gather is None or gather.copied:
            return
        gather.copied = True
        self.whole |= {name: self.sizes[name] for name in gather.waiting}

    def _bytes(self) -> float:
        buffers = {id(gather): gather.buffer for gather in self.travelling.values()}
        return sum(self.whole.values()) + sum(buffers.values())
