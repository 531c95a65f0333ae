"""What the measurement of checkpoints found, as tables: seconds, bytes and memory beside the targets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import Line, summarize
from benchmarks.resources import Cost

OWN, RAW, BARE = "bigvision", "raw read", "dd"
MEGABYTE = 10**6


@dataclass(frozen=True)
class Measured:
    """One side."""

    size: int
    """Bytes of its files."""
    watched: dict[str, Cost]
    """By what was done, "save" or a load's name: the round in which memory was watched."""
    costs: dict[str, list[Cost]]
    """The same in the timed rounds."""

    def seconds(self, act: str) -> list[float]:
        """Of each round; a save's until it was durable."""
        return [cost.durable for cost in self.costs[act]]

    def middle(self, act: str, count: str) -> float:
        """The median over the rounds of a count of bytes."""
        return median(getattr(cost, count) for cost in self.costs[act])


@dataclass(frozen=True)
class Stall:
    """Saving in the background."""

    held: int
    """Bytes that a rank holds of the state, at most."""
    watched: Cost
    """Of the first save, in which memory was watched."""
    saves: list[Cost]
    """``seconds`` is what the training waited."""
    copies: list[Cost]


@dataclass(frozen=True)
class Target:
    what: str
    figure: float
    interval: tuple[float, float] | None
    """Of the figure with 95 % confidence (bootstrap over the rounds); None for counts."""
    limit: float
    at_most: bool
    unit: str = ""

    @property
    def met(self) -> bool:
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit

    def row(self) -> str:
        between = "" if self.interval is None else f"{self.interval[0]:.3f} to {self.interval[1]:.3f}"
        wanted = f"at {'most' if self.at_most else 'least'} {self.limit:g}{self.unit}"
        figure = f"{self.figure:.0f}" if self.unit else f"{self.figure:.4f}" if self.interval is None else f"{self.figure:.3f}"
        return f"| {self.what} | {figure}{self.unit} | {between} | {wanted} | {'yes' if self.met else 'no'} |"


@dataclass(frozen=True)
class Report:
    title: str
    state: int
    """Bytes of all tensors of the state, each once."""
    groups: list[dict[str, Measured]]
    """Sides that took turns; bigvision's is in each."""
    stall: Stall
    rounds: int
    facts: dict[str, Any]

    def lines(self, save: bool) -> Iterator[tuple[str, Measured, str, Line]]:
        """Each save, or each load and raw read: (its name, its side, what it was of the side, its times over bigvision's)."""
        for number, group in enumerate(self.groups):
            base = group[OWN].seconds("save" if save else OWN)
            for name, side in group.items():
                for act in side.costs:
                    if (act == "save") == save and (name != OWN or number == 0):
                        called = name if save else act
                        yield called, side, act, summarize(called, side.seconds(act), base)

    def targets(self) -> list[Target]:
        """What was to be reached, and was it."""
        own = self.groups[0][OWN]
        saves, loads = ({name: line for name, _, _, line in self.lines(save)} for save in (True, False))
        found = []
        if peers := [name for name in saves if name != OWN and not name.startswith(BARE)]:
            best = min(peers, key=lambda name: saves[name].ratio)
            found.append(Target(f"durable save: {best} over bigvision", saves[best].ratio, saves[best].interval, 1.5, False))
        for source in ("zeros", "noise"):
            if bare := [name for name in saves if name.startswith(f"{BARE} of {source}")]:
                best = min(bare, key=lambda name: saves[name].ratio)
                what = f"durable save: {best} over bigvision"
                found.append(Target(what, saves[best].ratio, saves[best].interval, 0.85, False))
        raw = min((name for name in loads if name.startswith(RAW)), key=lambda name: loads[name].ratio)
        found.append(over(f"verified load: bigvision over {raw}", own.seconds(OWN), own.seconds(raw), 1.2))
        found.append(Target("bytes of the files over the state's", own.size / self.state, None, 1.005, True))
        stored = own.middle("save", "stored") / self.state
        found.append(Target("bytes written to the disk over the state's", stored, None, 1.005, True))
        for name, cost in (("save", own.watched["save"]), ("load", own.watched[OWN])):
            found.append(Target(f"memory of a {name}", (cost.memory or 0) / MEGABYTE, None, 256, True, " MB"))
        waited, copied = ([cost.seconds for cost in costs] for costs in (self.stall.saves, self.stall.copies))
        found.append(over("background save: stall over a copy in memory", waited, copied, 1.15))
        beyond = ((self.stall.watched.memory or 0) - self.stall.held) / MEGABYTE
        found.append(Target("memory of a background save beyond the copy", beyond, None, 256, True, " MB"))
        return found

    def table(self) -> str:
        """The report as Markdown."""
        facts = ", ".join(f"{key} {value}" for key, value in self.facts.items())
        rows = [f"## {self.title}: {self.state / 1e9:.2f} GB of state", ""]
        rows += ["| target | found | 95 % interval | wanted | met |", "|---|---:|---:|---:|---|"]
        rows += [target.row() for target in self.targets()]
        rows += [
            "",
            "Saves until every file was durable; `returned` is when the call came back. Ratios are times over bigvision's in "
            "the same rounds.",
            "",
            "| save | GB/s | s (quartiles) | s returned | over bigvision | 95 % interval | files / state | written / state | "
            "memory, MB |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for name, side, act, line in self.lines(save=True):
            returned = median(cost.seconds for cost in side.costs[act])
            written = side.middle(act, "stored") / self.state
            sizes = f"{side.size / self.state:.4f} | {written:.4f} | {megabytes(side.watched[act])} |"
            rows.append(f"| {name} | {self._speed(line)} | {returned:.2f} | {over_own(name, line)} | {sizes}")
        rows += [
            "",
            "Loads from files that were not in the page cache.",
            "",
            "| load | GB/s | s (quartiles) | over bigvision | 95 % interval | read from the disk / state | memory, MB |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, side, act, line in self.lines(save=False):
            read = f"{side.middle(act, 'fetched') / self.state:.3f} | {megabytes(side.watched[act])} |"
            rows.append(f"| {name} | {self._speed(line)} | {over_own(name, line)} | {read}")
        waited, durable = (median(getattr(cost, when) for cost in self.stall.saves) for when in ("seconds", "durable"))
        copied, first = median(cost.seconds for cost in self.stall.copies), self.stall.watched
        rows += [
            "",
            f"Background save: the training waited {waited * 1e3:.0f} ms ({first.seconds * 1e3:.0f} ms at the first save, "
            f"which gets the memory); a copy in memory of what a rank holds took {copied * 1e3:.0f} ms; durable after "
            f"{durable:.2f} s; memory {megabytes(first)} MB, of which the copy {self.stall.held / MEGABYTE:.0f}.",
        ]
        return "\n".join([*rows, "", f"{self.rounds} rounds; {facts}.", ""])

    def write(self, stem: Path) -> None:
        """Write ``stem.json`` and ``stem.md``."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        targets = [asdict(target) | {"met": target.met} for target in self.targets()]
        kinds = {"saves": self.lines(save=True), "loads": self.lines(save=False)}
        lines = {kind: [asdict(line) for *_, line in found] for kind, found in kinds.items()}
        stem.with_suffix(".json").write_text(json.dumps({"targets": targets} | lines | asdict(self), indent=1) + "\n")
        stem.with_suffix(".md").write_text(self.table())

    def _speed(self, line: Line) -> str:
        low, high = line.quartiles
        return (
            f"{self.state / line.milliseconds / 1e6:.3f} | {line.milliseconds / 1e3:.2f} ({low / 1e3:.2f} to {high / 1e3:.2f})"
        )


def over(what: str, times: Sequence[float], base: Sequence[float], limit: float) -> Target:
    """At most *limit* times what *base* took in the same rounds."""
    line = summarize(what, times, base)
    return Target(what, line.ratio, line.interval, limit, at_most=True)


def over_own(name: str, line: Line) -> str:
    """Two cells."""
    return "1 | " if name == OWN else f"{line.ratio:.3f} | {line.interval[0]:.3f} to {line.interval[1]:.3f}"


def megabytes(cost: Cost) -> str:
    """The growth of the memory."""
    return f"{(cost.memory or 0) / MEGABYTE:.0f}"
