"""Silent corruption: what several ranks hold alike is compared by digests, which are exchanged instead of the tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest as _hash

from bigvision.engine import Engine
from bigvision.fragments import Fragment
from bigvision.runtime import gather_json

PIECE = 1 << 22
"""Words that are added up at a time, eight bytes each."""
SHOWN = 4
"""Tensors that an error names."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Corruption(Exception):
    """What ranks hold alike differs; the same on every rank."""


def check_copies(engine: Engine) -> None:
    """Compare over the ranks all that :meth:`Engine.copies` yields. Called on every rank.

    Raises:
        Corruption: some differ; names the tensors, and the ranks that differ from most others.
    """
    mine = _digests(engine.copies())
    # Ranks that hold the same tensors hold the same bits, so one digest of all of them is enough while all is well.
    groups = {held: _hash("".join(found.values()).encode()) for held, found in mine.items()}
    seen: dict[str, set[str]] = defaultdict(set)
    for theirs in gather_json(groups):
        for held, digest in theirs.items():
            seen[held].add(digest)
    if all(len(digests) == 1 for digests in seen.values()):
        return
    # Every rank knows which groups differ, and so all come to the same error.
    unequal = {held: found for held, found in mine.items() if len(seen[held]) > 1}
    where: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, theirs in enumerate(gather_json(unequal)):
        for held, found in theirs.items():
            for name, digest in found.items():
                where[f"{held}:{name}"][digest].append(rank)
    wrong = [_said(key, ranks) for key, ranks in where.items() if len(ranks) > 1]
    more = f"; and {len(wrong) - SHOWN} more tensors" if len(wrong) > SHOWN else ""
    raise Corruption(
        f"silent corruption, found after step {engine.step}: what ranks hold alike differs: {'; '.join(wrong[:SHOWN])}{more}. "
        "Nothing of it was saved: check the memory and the device of that rank, and start the run again"
    )


def _said(key: str, ranks: dict[str, list[int]]) -> str:
    """Who differs: the fewer, where there are fewer."""
    sizes = sorted(map(len, ranks.values()))
    name = key.partition(":")[2]
    if sizes[-1] == sizes[-2]:
        return f"{name} on ranks {_numbers(rank for found in ranks.values() for rank in found)}, either of which may be wrong"
    most = max(ranks.values(), key=len)
    others = sorted(rank for found in ranks.values() if found is not most for rank in found)
    return f"{name} on rank{'s'[: len(others) > 1]} {_numbers(others)}, unlike on {_numbers(most)}"


def _numbers(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def _digests(fragments: Iterable[Fragment]) -> dict[str, dict[str, str]]:
    """Of each run of a tensor, by its name; those that the same ranks hold together, under a digest of the names."""
    groups: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for fragment in fragments:
        name = f"{fragment.group} {fragment.name}"
        if fragment.values.numel() < fragment.numel:
            name += f"[{fragment.start}:{fragment.start + fragment.values.numel()}]"
        groups[fragment.copy[1]][name] = fragment.values
    found: dict[str, dict[str, str]] = {}
    for values in groups.values():
        found[_hash("\n".join(values).encode())] = dict(zip(values, digests(list(values.values()))))
    return found


def digests(tensors: list[Tensor]) -> list[str]:
    """A digest of the bits of each 1-D tensor, 16 hexadecimal digits; what lies on a device is not copied from it."""
    away = [checksum(tensor) for tensor in tensors if tensor.device.type != "cpu"]
    sums = iter(torch.stack(away).tolist() if away else [])
    return [
        _hash(tensor.contiguous().view(torch.uint8).numpy().data)
        if tensor.device.type == "cpu"
        else f"{next(sums) % 2**64:016x}"
        for tensor in tensors
    ]


def checksum(tensor: Tensor) -> Tensor:
    """The sum modulo 2**64 of all words, each times an odd number that depends on its place: int64, 0-D, on the device.

    A change of one word always changes it, whatever the change; several have to meet by chance.
    """
    words = tensor.contiguous().view(WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, len(words), PIECE):
        part = words[begin : begin + PIECE]
        factor = torch.arange(begin, begin + len(part), device=tensor.device)
        # SplitMix64's constants (Steele et al. 2014), as signed numbers.
        factor = factor.add_(1).mul_(-0x61C8864680B583EB)
        factor = factor.bitwise_xor_(factor >> 30).mul_(-0x40A7B892E31B1A47).bitwise_or_(1)
        total += factor.mul_(part).sum()
    return total
