"""Equal blocks in a row are recorded few times: what those in the middle do, every further one does.

Of a *run* of equal blocks the first four and the last two are recorded; the third stands for those that are left out. Where
activations are offloaded, a block frees what blocks up to three places before it made, so there are five and the fourth. Its
allocations are named by where they were made (which pass, how many blocks ahead, the how-manieth), so that a copy of its passes
refers to its own neighbours. Where the third and the fourth block differ in anything, `NotRepeated` is raised, and the whole
model has to be recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from bigvision.models import Block
from bigvision.models.alike import RATES
from bigvision.planning.recorder import Recording, Stretch

BEHIND = 2
"""How many blocks of a run are recorded at its end."""
REACH, OFFLOADED = 1, 3
"""How many places from itself a block frees what others made, and where activations are offloaded."""


class NotRepeated(Exception):
    """Blocks that look equal do not behave alike."""


@dataclass(frozen=True)
class Run:
    """Equal blocks in a row, each the next child of one container."""

    first: int
    """The number of its first block among all blocks."""
    length: int
    reach: int = REACH

    @property
    def template(self) -> int:
        """Which of its blocks stands for the others, counted from 0."""
        return max(2, self.reach)

    @property
    def ahead(self) -> int:
        """How many are recorded at its beginning."""
        return self.template + 2

    @property
    def left_out(self) -> range:
        """The numbers of the blocks that are not recorded."""
        return range(self.first + self.ahead, self.first + self.length - BEHIND)


def runs_of(module: nn.Module, blocks: Sequence[Block], kinds: Mapping[nn.Module, int], reach: int = REACH) -> list[Run]:
    """The runs of *module* of which two blocks or more are left out; *kinds* are those of `bigvision.models.kinds`."""
    found: list[Run] = []
    begin, before = 0, None
    for number, block in enumerate([*blocks, None]):
        path, _, name = block.path.rpartition(".") if block else ("", "", "")
        container = module.get_submodule(path) if block and path else None
        now = None
        if block is not None and isinstance(container, (nn.Sequential, nn.ModuleList)):
            now = path, list(container._modules).index(name), _signature(block.module, kinds)
        follows = before is not None and now is not None and (before[0], before[1] + 1, before[2]) == now
        if not follows:
            if len((run := Run(begin, number - begin, reach)).left_out) >= 2:
                found.append(run)
            begin = number
        before = now
    return found


def _signature(block: nn.Module, kinds: Mapping[nn.Module, int]) -> Any:
    """What equal blocks have alike beside their kind: what is trained, in which types, and where something is dropped."""
    parameters = tuple((p.requires_grad, p.dtype) for p in block.parameters())
    drops = tuple(bool(getattr(part, RATES[type(part)])) for part in block.modules() if type(part) in RATES)
    return kinds[block], parameters, tuple(part.training for part in block.modules()), drops


def leave_out(module: nn.Module, blocks: Sequence[Block], runs: Sequence[Run]) -> list[Block]:
    """Take the blocks that are not recorded out of *module*, and return the others."""
    gone = {number for run in runs for number in run.left_out}
    for number in gone:
        path, _, name = blocks[number].path.rpartition(".")
        del module.get_submodule(path)._modules[name]
    return [block for number, block in enumerate(blocks) if number not in gone]


def extended(recording: Recording, runs: Sequence[Run]) -> Recording:
    """*recording*, of a model without the blocks that *runs* leave out, with what these would do."""
    skipped = [sum(len(other.left_out) for other in runs[:place]) for place in range(len(runs))]
    for run, before in reversed(list(zip(runs, skipped))):  # the later ones first: numbers before them stay
        recording = _Extension(recording, run, run.first - before).made()
    return recording


def _unit(stretch: Stretch) -> int:
    """The block to whose pass *stretch* belongs, with what follows until the next block's."""
    return stretch.place // 2 if stretch.backward else (stretch.place - 1) // 2


class _Extension:
    """*recording* with the blocks that *run*, whose first block is recorded as the block *first*, leaves out."""

    def __init__(self, recording: Recording, run: Run, first: int) -> None:
        self.recording, self.count, self.reach = recording, len(run.left_out), run.reach
        self.run = range(first, first + run.ahead + BEHIND)
        self.template = first + run.template
        self.allocations: dict[tuple[bool, int], list[int]] = {}
        """The allocations in the passes of each block, in their order."""
        self.home: dict[int, tuple[bool, int, int]] = {}
        """Of each allocation the pass, its block, and its place among the pass's."""
        for stretch in recording.stretches:
            mine = self.allocations.setdefault((stretch.backward, _unit(stretch)), [])
            for kind, number in stretch.events:
                if kind == "allocate":
                    self.home[number] = stretch.backward, _unit(stretch), len(mine)
                    mine.append(number)
        self._check()
        self.sizes = list(recording.sizes)
        self.copies: dict[tuple[bool, int, int], int] = {}
        """The allocations of the further blocks, which are numbered on from the template."""
        for backward in (False, True):
            for place, number in enumerate(self.allocations.get((backward, self.template), ())):
                for further in range(1, self.count + 1):
                    self.copies[backward, self.template + further, place] = len(self.sizes)
                    self.sizes.append(recording.sizes[number])

    def made(self) -> Recording:
        template, count, found = self.template, self.count, self.recording
        stretches: list[Stretch] = []
        mine: dict[bool, list[Stretch]] = {False: [], True: []}
        for stretch in found.stretches:
            if _unit(stretch) == template:
                mine[stretch.backward].append(stretch)
        for stretch in found.stretches:
            if mine[True] and stretch is mine[True][0]:
                for further in range(count, 0, -1):
                    stretches += [self._moved(one, further) for one in mine[True]]
            stretches.append(self._moved(stretch, count if self._is_behind(stretch) else 0))
            if mine[False] and stretch is mine[False][-1]:
                for further in range(1, count + 1):
                    stretches += [self._moved(one, further) for one in mine[False]]
        boundaries = {(n + count * (n > template), out): size for (n, out), size in found.boundaries.items()}
        for (number, out), size in found.boundaries.items():
            if number == template:
                boundaries |= {(number + further, out): size for further in range(1, count + 1)}
        used = {name: place + 2 * count * (place > 2 * template + 2) for name, place in found.used.items()}
        return Recording(self.sizes, stretches, boundaries, used)

    def _is_behind(self, stretch: Stretch) -> bool:
        """Whether *stretch* is of a block behind the further ones, or of what follows the last block."""
        return _unit(stretch) > self.template

    def _moved(self, stretch: Stretch, by: int) -> Stretch:
        """*stretch* as a pass of the block *by* places on."""
        at = _unit(stretch)

        def named(number: int) -> int:
            backward, unit, place = self.home[number]
            if at not in self.run or unit not in self.run:
                return number
            wanted = unit + by
            if wanted <= self.template:
                return self.allocations[backward, wanted][place]
            if wanted > self.template + self.count:
                return self.allocations[backward, wanted - self.count][place]
            return self.copies[backward, wanted, place]

        return replace(stretch, place=stretch.place + 2 * by, events=[(kind, named(number)) for kind, number in stretch.events])

    def _check(self) -> None:
        """Raise `NotRepeated` unless the template does what the next block does, and nothing else refers to them."""
        for backward in (False, True):
            if self._described(backward, self.template) != self._described(backward, self.template + 1):
                raise NotRepeated
            counts = {len(self.allocations.get((backward, self.template + step), ())) for step in (-1, 0, 1)}
            if len(counts) > 1:
                raise NotRepeated
        middle = range(self.template - 1, self.template + 2)
        for stretch in self.recording.stretches:
            at = _unit(stretch)
            for _, number in stretch.events:
                unit = self.home[number][1]
                near = abs(unit - at) <= self.reach if at in middle else unit not in middle or at in self.run
                if unit in self.run and not near:
                    raise NotRepeated

    def _described(self, backward: bool, number: int) -> list[Any]:
        """The pass of the block *number*, with blocks counted from it."""
        sizes, found = self.recording.sizes, list[Any]()
        for stretch in self.recording.stretches:
            if stretch.backward != backward or _unit(stretch) != number:
                continue
            events = []
            for kind, allocation in stretch.events:
                made, unit, place = self.home[allocation]
                where = (made, unit - number, place) if unit in self.run else allocation
                events.append((kind, where, sizes[allocation]))
            work = stretch.flops, stretch.moved, stretch.again_flops, stretch.again_moved, stretch.offloaded
            found.append((stretch.place - 2 * number, work, events, [one.kind for one in stretch.operations]))
        return found
