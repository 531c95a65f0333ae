"""The power fails at every moment of a series of saves; what the disk may then hold is always a whole, saved state.

The model of the disk is in :mod:`tests.checkpoint.disks`.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

from bigvision import checkpoint
from bigvision.checkpoint.commit import Writer
from bigvision.runtime import start
from tests.checkpoint.disks import Disk, Tree, fingerprint, read_tree, write_tree
from tests.checkpoint.recording import Event, record
from tests.checkpoint.states import Save, find_version, kept, save_version
from tests.distributed import run_ranks

OUT = Path("runs/of/today")
"""None of these folders is there before the first start."""
PERMANENT = r"step-\d+|latest|\.?lock"
"""What a start leaves in the output folder."""


@dataclass(frozen=True)
class Scenario:
    ranks: int
    how: str
    saves: tuple[Save, ...]
    shard_size: int = 10**9
    scale: int = 1
    writer: Writer = "direct"
    rounds: int = 1
    """Random losses of each kind at each moment."""
    made: bool = False
    """Whether the user made the output folder just before."""
    twice: str = r"aside"
    """Leftovers that meet a second loss, while the next start clears up and saves."""


ONE = (Save(10, 1, 1), Save(20, 2, 1), Save(20, 3, 1), Save(30, 4, 1))
TWO = (Save(1, 1, 2), Save(2, 2, 2), Save(3, 3, 2), Save(3, 4, 2), Save(4, 5, 1))
SCENARIOS = {
    "one rank, keep 1": Scenario(1, "whole", ONE),
    "three ranks, several files": Scenario(3, "flat", TWO[2:4], 6000, rounds=0, twice="never"),
    "a folder made by hand": Scenario(1, "whole", ONE[:1], made=True, twice="never"),
    "long: one rank, keep 1": Scenario(1, "whole", ONE, rounds=12, twice=""),
    "long: two ranks, a step again": Scenario(2, "rows", TWO, rounds=12, twice=""),
    "long: three ranks, many files": Scenario(3, "flat", TWO, 2000, rounds=6, twice=""),
    "long: by owners": Scenario(3, "flat", TWO, 6000, writer="owner", rounds=2, twice="never"),
    "long: large files": Scenario(2, "flat", ONE[:3], 300_000, scale=60, twice="never"),
}


def record_on_rank(root: Path, clock: Path, scenario: Scenario) -> list[Event]:
    with start("cpu") as runtime, record(root, clock, runtime.rank) as recorder:
        if runtime.is_main:
            if scenario.made:
                os.makedirs(root / OUT)
            checkpoint.Lock(root / OUT).release()
            checkpoint.prepare_folder(root / OUT)
        for save in scenario.saves:
            if runtime.is_main:
                recorder.note(("begins", save))
            how, size, scale = scenario.how, scenario.shard_size, scenario.scale
            save_version(root / OUT, save, runtime.rank, runtime.world_size, how, size, scale, scenario.writer)
            if runtime.is_main:
                recorder.note(("saved", save))
    return recorder.events


@dataclass
class Outcome:
    """What the starts after the losses found."""

    scratch: Path
    """Where the disks are remade after each loss."""
    calls: int = 0
    trees: int = 0
    found: Counter[int | None] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    """What was not as it must be, by its kind."""
    unfinished: dict[str, tuple[Tree, list[Save], Save | None]] = field(default_factory=dict)
    """A tree with leftovers of each kind, with what had been saved then and what was being saved."""
    whole: dict[tuple[str, int], int] = field(default_factory=dict)
    """Versions of step folders that were read, by their name and fingerprint."""

    def complain(self, kind: str, text: str) -> None:
        self.wrong.setdefault(kind, []).append(text)

    def expect_no(self, *kinds: str) -> None:
        said = [f"{len(self.wrong[k])} of {self.trees} trees, {k}:\n{self.wrong[k][0]}" for k in kinds if k in self.wrong]
        assert not said, "\n".join(said)


def lose_power(events: list[Event], before: Tree, root: Path, done: list[Save], rounds: int, outcome: Outcome) -> None:
    """Check what a start finds after a loss at each moment of *events*, on a disk that held *before*."""
    rng, disk, seen = random.Random(1), Disk(root, before), set()
    done, running, happened = list(done), None, "the start"
    for event in events:
        if event.call is None:
            what, save = event.note
            running = save if what == "begins" else None
            done += [save] if what == "saved" else []
        else:
            disk.apply(event)
            outcome.calls += 1
            if not event.changes:
                continue
            happened = f"call {outcome.calls} ({event.call} on rank {event.rank})"
        for tree in disk.losses(rng, rounds):
            key = (fingerprint(tree), len(done), running)
            if key not in seen:
                seen.add(key)
                outcome.trees += 1
                when = f"after {happened}, {len(done)} saved" + (f", saving step {running.step}" if running else "")
                _check(tree, outcome.scratch, done, running, when, outcome)


def _check(tree: Tree, root: Path, done: list[Save], running: Save | None, when: str, outcome: Outcome) -> None:
    write_tree(root, tree)
    out, said = root / OUT, list[str]()
    for path in out.glob("*"):
        if not re.fullmatch(PERMANENT, path.name):
            outcome.unfinished.setdefault(re.sub(r"[0-9a-f]{8,}", "", path.name), (tree, list(done), running))
    try:
        checkpoint.Lock(out).release()
        checkpoint.prepare_folder(out)
        names = sorted(path.name for path in out.iterdir())
        version = find_version(out, said.append)
        outcome.found[version] += 1
        allowed = {done[-1].version} if done else {None}
        if version not in allowed | ({running.version} if running else set()):
            outcome.complain("lost", f"{when}: version {version} was found, not {allowed}, in {names}; {said}")
        if said:
            outcome.complain("fell back", f"{when}: {said}")
        _check_older(tree, root, done, running, version, when, outcome)
        if strange := [name for name in names if not re.fullmatch(PERMANENT, name)]:
            outcome.complain("left over", f"{when}: {strange}")
        hint = (out / "latest").read_text() if (out / "latest").exists() else "step-00000000\n"
        if not re.fullmatch(r"step-\d{8}\n", hint):
            outcome.complain("hint", f"{when}: latest holds {hint!r}")
    except Exception as error:
        outcome.complain("exception", f"{when}: {type(error).__name__}: {error}")
    finally:
        shutil.rmtree(root)


def _check_older(
    tree: Tree, root: Path, done: list[Save], running: Save | None, version: int | None, when: str, outcome: Outcome
) -> None:  # fmt: skip
    """What no pruning may have removed is whole; and what is being removed does not look like a checkpoint."""
    before, after = kept(done), kept([*done, running] if running else done)
    needed = set(before) & set(after) if running and version == running.version else set(before)
    held = tree
    for part in OUT.parts:
        held = held.get(part, {})
    for step in needed | set(checkpoint.steps_in(root / OUT)):
        name = checkpoint.folder_name(step)
        key = (name, fingerprint(held.get(name, {})))
        if key not in outcome.whole or not (root / OUT / name).is_dir():
            try:
                outcome.whole[key] = find_version(root / "none", print, str(root / OUT / name)) or 0
            except Exception as error:
                kind = "lost" if step in needed else "half removed"
                outcome.complain(kind, f"{when}: {error}")
                continue
        if outcome.whole[key] not in (before.get(step), after.get(step)) and step in needed:
            outcome.complain("lost", f"{when}: {name} is version {outcome.whole[key]}, not {before.get(step)}")


def outcome_of(scenario: Scenario, folder: Path, scratch: Path) -> Outcome:
    (root := folder / "disk").mkdir()
    recordings = run_ranks(record_on_rank, scenario.ranks, root, folder / "clock", scenario)
    events = sorted((event for recording in recordings for event in recording), key=lambda event: event.when)
    whole = Disk(root, {})
    for event in events:
        whole.apply(event)
    assert whole.now() == read_tree(root), "something was done to the disk that was not recorded"
    outcome = Outcome(scratch / "after")
    # What the starts bring to the disk is modelled, too, where it is recorded; the real disk only costs time.
    with start("cpu"), mock.patch.object(os, "fsync", lambda descriptor: None):
        lose_power(events, {}, root, [], scenario.rounds, outcome)
        cases = [case for name, case in outcome.unfinished.items() if re.search(scenario.twice, name)]
        for number, (tree, done, running) in enumerate(cases):
            again = folder / f"disk-{number}"
            write_tree(again, tree)
            with record(again, folder / "clock") as recorder:
                checkpoint.prepare_folder(again / OUT)
                version = find_version(again / OUT, print)
                done = [*done, running] if running and version == running.version else done
                save = Save((done or list(scenario.saves))[-1].step + 1, 99, 1)
                recorder.note(("begins", save))
                save_version(again / OUT, save, how="whole", shard_size=scenario.shard_size)
                recorder.note(("saved", save))
            lose_power(recorder.events, tree, again, done, scenario.rounds, outcome)
    return outcome


LENGTHS = [pytest.param(name, marks=[pytest.mark.long] * name.startswith("long")) for name in SCENARIOS]


@pytest.fixture(scope="module", params=LENGTHS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    # Thousands of small files are made and removed: in memory, where there is such a place.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        return outcome_of(SCENARIOS[request.param], tmp_path_factory.mktemp("power"), Path(scratch))


def test_a_start_takes_the_newest_saved_state_or_a_newer_whole_one(outcome: Outcome) -> None:
    """And every other that was saved and not yet pruned is whole; nothing raises, and nothing damaged is passed over."""
    assert outcome.trees > 50 and len(outcome.found) > 1
    outcome.expect_no("lost", "fell back", "exception")


def test_a_half_removed_checkpoint_does_not_look_like_one(outcome: Outcome) -> None:
    outcome.expect_no("half removed")


def test_the_next_start_clears_up(outcome: Outcome) -> None:
    outcome.expect_no("left over")


def test_the_hint_is_never_torn(outcome: Outcome) -> None:
    outcome.expect_no("hint")
