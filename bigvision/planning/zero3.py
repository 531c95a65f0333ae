"""Which parameters DeepSpeed's stage 3 gathers in the two passes of a micro-batch.

Its `PartitionedParameterCoordinator` fetches what a module needs and, as far as its limits go, what is used next; it frees what
a module has used, unless that is used again soon. What it has fetched ahead when the passes turn is not gathered again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from bigvision.config import Config
from bigvision.planning.memory import zero_settings
from bigvision.planning.profile import Profile, StateTensor

Event = tuple[bool, str, bool]
"""Whether a module is entered or left, its path, and whether that is in the backward pass."""


def fetched(profile: Profile, config: Config, ranks: int) -> dict[tuple[bool, int], float]:
    """Bytes that are gathered, with their padding, by (whether in the backward pass, part).

    Modules are taken in the order of their names in the model, which is that of their calls in most models.
    """
    limits = zero_settings(profile, config, ranks)
    whole, most = limits["stage3_param_persistence_threshold"], limits["stage3_max_live_parameters"]
    bucket, distance = limits["stage3_prefetch_bucket_size"], limits["stage3_max_reuse_distance"]
    part_of = {tensor.name: number for number, part in enumerate(profile.parts) for tensor in part.tensors}
    modules: dict[str, list[StateTensor]] = {}
    for tensor in (tensor for part in profile.parts for tensor in part.tensors if not tensor.buffer):
        modules.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
    trained = {path for path, tensors in modules.items() if any(tensor.trained for tensor in tensors)}
    again = [part.path for part in profile.parts if part.path and config.parallel.recompute == "blocks"]
    events = _events(list(modules), trained, again)
    order = [path for enters, path, _ in events if enters]
    uses = deque((tensor, step) for step, path in enumerate(order) for tensor in modules[path])
    here, last = set[str](), dict.fromkeys(part_of, -1)
    """What is gathered now, and the last step for which each was fetched."""
    sizes = {(backward, number): 0.0 for backward in (False, True) for number in range(len(profile.parts))}
    step = live = 0

    def gather(tensors: list[StateTensor], backward: bool) -> int:
        missing = [tensor for tensor in tensors if tensor.numel > whole and tensor.name not in here]
        for tensor in missing:
            here.add(tensor.name)
            sizes[backward, part_of[tensor.name]] += float(in_shares(tensor.numel, ranks) * tensor.computes.itemsize)
        return sum(tensor.numel for tensor in missing)

    for enters, path, backward in events:
        if enters:
            live += gather(modules[path], backward)
            waiting = {tensor.name for tensor in modules[path] if last[tensor.name] < step}
            while uses and waiting:
                tensor, used = uses.popleft()
                last[tensor.name] = used
                waiting.discard(tensor.name)
            ahead, allowed = 0, min(most - live, bucket)
            while uses and ahead < allowed:
                tensor, used = uses.popleft()
                last[tensor.name] = max(last[tensor.name], used)
                ahead += gather([tensor], backward)
            live, step = live + ahead, step + 1
            continue
        free = {tensor.name: tensor.numel for tensor in modules[path] if tensor.name in here and last[tensor.name] <= step}
        passed = 0
        for other in order[step:]:
            if passed >= distance:
                break
            for tensor in modules[other]:
                free.pop(tensor.name, None)
                passed += tensor.numel
        here.difference_update(free)
        live -= sum(free.values())
    return sizes


def in_shares(numel: int, ranks: int) -> int:
    """Elements of a parameter in *ranks* equal shares, of which the last ones are padded."""
    return -(-numel // ranks) * ranks


def _events(paths: Sequence[str], trained: Collection[str], again: Sequence[str]) -> list[Event]:
    """How the passes enter and leave the modules at *paths*, in the order of their calls.

    One that holds others is entered before them and left after them. The backward pass goes back to the first *trained* one.
    The blocks *again* run forward once more when the backward pass has entered the last of their modules.
    """

    def within(path: str, outer: str) -> bool:
        return not outer or path == outer or path.startswith(f"{outer}.")

    known, order = set(paths), dict[str, None]()
    for path in paths:
        names = path.split(".")
        outer = [".".join(names[:depth]) for depth in range(len(names) + 1)]
        order.update(dict.fromkeys(one for one in outer if one in known))
    forward: list[Event] = []
    inside: list[str] = []
    for path in order:
        while inside and not within(path, inside[-1]):
            forward.append((False, inside.pop(), False))
        inside.append(path)
        forward.append((True, path, False))
    forward += [(False, path, False) for path in reversed(inside)]
    first = next((place for place, path in enumerate(order) if path in trained), len(order))
    reached = {path for place, path in enumerate(order) if place >= first or any(within(inner, path) for inner in trained)}
    found, entered = list(forward), set[str]()
    for enters, path, _ in reversed(forward):
        if path not in reached:
            continue
        found.append((not enters, path, True))
        block = next((block for block in again if within(path, block)), None)
        if block is not None and block not in entered:
            entered.add(block)
            found += [(one, other, True) for one, other, _ in forward if within(other, block)]
    return found
