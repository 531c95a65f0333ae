"""What differs between two checkpoints, of one run or of two."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigvision.checkpoint.manifest import Damaged, ReadError, read_document
from bigvision.checkpoint.reader import Tensors
from bigvision.checkpoint.retention import check_step_folder
from bigvision.errors import UserError
from bigvision.fragments import Place

GROUPS = ("model", "ema", "optimizer")
ABSENT = "(absent)"


@dataclass(frozen=True)
class Change:
    """A tensor of the same shape and type on both sides, with other values."""

    name: str
    differing: int
    """Elements whose bits differ."""
    elements: int
    largest: float
    """The largest absolute difference of an element; NaN where something that is not a number differs."""
    relative: float
    """The norm of the difference over the norm of the first side's tensor."""


@dataclass
class Group:
    """The tensors of one group."""

    same: int = 0
    only: dict[str, list[str]] = field(default_factory=lambda: {"A": [], "B": []})
    """Names, with type and shape, by the side that has them."""
    reshaped: list[str] = field(default_factory=list)
    changed: list[Change] = field(default_factory=list)
    """The worst first: by the relative difference, what is not a number before all."""

    @property
    def identical(self) -> bool:
        return not (self.only["A"] or self.only["B"] or self.reshaped or self.changed)


@dataclass
class Difference:
    """Between two checkpoints, A and B."""

    documents: dict[str, tuple[str, str]]
    """By dotted key of progress.json and of config.json ("card."): both values as JSON."""
    groups: dict[str, Group]

    @property
    def identical(self) -> bool:
        return not self.documents and all(group.identical for group in self.groups.values())


def compare(a: Path, b: Path) -> Difference:
    """Compare two step folders, a part of a tensor at a time; `UserError` where one is not a checkpoint, or damaged."""
    sides, documents = [], []
    for folder in (a, b):
        check_step_folder(folder)
        try:
            side = Tensors(folder, GROUPS)
            documents.append(dict(_flat(read_document(folder, side.ranges, "progress.json"))))
            documents[-1] |= dict(_flat(read_document(folder, side.ranges, "config.json"), "card."))
        except (Damaged, ReadError) as error:
            raise _invalid(folder, error) from None
        sides.append(side)
    first, second = documents
    keys = [key for key in first | second if first.get(key, ABSENT) != second.get(key, ABSENT)]
    changes = {key: (first.get(key, ABSENT), second.get(key, ABSENT)) for key in keys}
    groups = [name for name in GROUPS if name in sides[0].places or name in sides[1].places]
    return Difference(changes, {name: _compare_group(name, *sides) for name in groups})


def _compare_group(name: str, a: Tensors, b: Tensors) -> Group:
    ours, theirs = a.places.get(name, {}), b.places.get(name, {})
    group, both = Group(), ours | theirs
    for tensor in sorted(both):
        here, there = ours.get(tensor), theirs.get(tensor)
        if here is None or there is None:
            group.only["A" if here else "B"].append(f"{tensor}  {both[tensor].kind}")
        elif here.kind != there.kind:
            group.reshaped.append(f"{tensor}  {here.kind} | {there.kind}")
        elif change := _compare(tensor, _parts(a, here), _parts(b, there)):
            group.changed.append(change)
        else:
            group.same += 1
    group.changed.sort(key=lambda change: (not math.isnan(change.relative), -change.relative, change.name))
    return group


def _compare(name: str, a: Iterator[Tensor], b: Iterator[Tensor]) -> Change | None:
    elements, differing, largest, difference, norm = 0, 0, 0.0, 0.0, 0.0
    for ours, theirs in zip(a, b):
        elements += ours.numel()
        width = ours.element_size()
        # As bits: a zero's sign counts, and a NaN is equal to itself.
        unequal = (ours.view(torch.uint8) != theirs.view(torch.uint8)).view(-1, width).any(dim=1)
        ours, theirs = ours.double(), theirs.double()
        norm += float(ours.square().sum())
        if count := int(unequal.sum()):
            apart = (ours[unequal] - theirs[unequal]).abs()
            differing += count
            largest = float(torch.maximum(apart.max(), torch.tensor(largest, dtype=torch.float64)))
            difference += float(apart.square().sum())
    if not differing:
        return None
    relative = math.sqrt(difference / norm) if norm else math.inf if difference else 0.0
    return Change(name, differing, elements, largest, relative)


def _parts(side: Tensors, place: Place) -> Iterator[Tensor]:
    try:
        yield from side.parts(place)
    except (Damaged, ReadError) as error:
        raise _invalid(side.folder, error) from None


def _invalid(folder: Path, error: Exception) -> UserError:
    return UserError(str(error) if isinstance(error, ReadError) else f"{folder} is not a valid checkpoint: {error}")


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value)
