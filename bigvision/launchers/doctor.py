"""``bigvision doctor``: whether this machine, these ranks and this recipe will train, before anybody waits or pays for them.

Every rank looks at itself first (machine.py, placement.py). Then the ranks meet at a store, which needs neither GPUs nor a
process group, and rank 0 prints the lines of all. Then the data is opened, `out` is written to, and a process group adds up a
tensor and takes two steps (dry_run.py). What a check raises is a line of that check.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bigvision.config import Config, resolve
from bigvision.errors import Exit, UserError, one_line
from bigvision.launchers import dry_run, machine, placement
from bigvision.launchers.accelerate import overrides
from bigvision.launchers.commands import take_recipe
from bigvision.launchers.machine import Here, Lines, State
from bigvision.launchers.placement import ranges
from bigvision.runtime import (
    Identity,
    RankFailure,
    Watchdog,
    collective_timeout,
    deterministic,
    identify,
    operations_named,
    start,
)
from bigvision.runtime.process import choose_device
from bigvision.runtime.rendezvous import meet

PROG = "bigvision doctor [RECIPE]"
CHECKS: dict[str, Callable[[Here], Lines]] = {
    "launcher": placement.launcher,
    "environment": placement.environment,
    "versions": machine.versions,
    "devices": machine.devices,
    "links": machine.links,
    "compilers": machine.compilers,
    "shared memory": machine.shared_memory,
    "open files": machine.open_files,
    "network": placement.network,
    "cores": placement.cores,
}
"""What each rank looks at by itself, by the word with which the lines begin."""
COMPARED: dict[str, Callable[[placement.Facts], Lines]] = {
    "launcher": placement.ranks_of_hosts,
    "versions": placement.same_versions,
    "cores": placement.enough_cores,
}
"""What rank 0 looks at of all ranks."""
NEEDED_TO_MEET = {"launcher", "devices", "network", "ranks"}
"""After an error in one of these, ranks would wait for each other."""
NEEDED_TO_TRAIN = {"recipe", "data", "out"}
MEETING = timedelta(minutes=2)
"""How long ranks that are started together wait for each other."""
LAST = timedelta(seconds=20)
"""How long rank 0 waits for the last lines of ranks that a fault may have ended, and they for it."""


class Finding(NamedTuple):
    """A line."""

    check: str
    state: State
    text: str


def run(arguments: list[str]) -> int:
    """``[RECIPE] [--section.key value ...]``: print what was found; 2 where something is an error. Called on every rank."""
    if {"-h", "--help"} & set(arguments):
        resolve(None, ["--help"], prog=PROG)
    config, identity, device = Config(), Identity(0, 1, 0, 1, "python"), None
    found: list[Finding] = []
    with ExitStack() as stack:
        try:
            config = read(arguments, found)
            stack.enter_context(deterministic(config.train.deterministic, config.parallel.device))  # before CUDA starts
        except UserError as error:
            found.append(Finding("recipe", "error", str(error)))
        try:
            identity = identify(os.environ)
        except UserError as error:
            found.append(Finding("launcher", "error", str(error)))
        with suppress(Exception):  # which the check of the devices reports
            device = choose_device(config.parallel.device, identity)
        here = Here(config, identity, device)
        for name, check in CHECKS.items():
            found += examine(name, partial(check, here)) if name not in errors(found) else []
        ranks = Ranks(identity, found)
        try:
            if "launcher" not in errors(found):
                ranks.meet(collective_timeout(config.limits))
                return together(here, ranks)
        except UserError as error:
            ranks.own.append(Finding("ranks", "error", str(error)))
        except RuntimeError as error:  # another rank has not come or has gone, and with it perhaps the store
            place = f"{identity.address}:{identity.port}"
            why = f"this rank has lost the others ({one_line(error)}): start all at once, and let each reach {place}"
            ranks.own.append(Finding("ranks", "error", why))
        ranks.print({identity.rank: ranks.own})
        return ranks.end()


def read(arguments: Sequence[str], found: list[Finding]) -> Config:
    """The configuration of a run with these *arguments*; adds what a run would print of it to *found*."""
    recipe, flags, note = take_recipe(arguments)
    notes = [note or f"recipe: {recipe}"]
    config, _ = resolve(recipe, flags, overrides(os.environ, notes.append), prog=PROG, say=notes.append)
    found += (Finding("recipe", "ok", line.removeprefix("recipe: ")) for line in notes)
    return config


def examine(name: str, check: Callable[[], Lines]) -> list[Finding]:
    """The lines of a check. Where it raises, these are the ones before that, and the error."""
    found = []
    try:
        for state, text in check():
            found.append(Finding(name, state, text))
    except UserError as error:
        found.append(Finding(name, "error", str(error)))
    except Exception as error:
        found.append(Finding(name, "error", f"this check itself failed with {type(error).__name__}: {one_line(error)}"))
    return found


def errors(found: Iterable[Finding]) -> set[str]:
    """The checks that found an error."""
    return {one.check for one in found if one.state == "error"}


class Ranks:
    """What the ranks tell each other, at the store where they meet, and what rank 0 prints of it."""

    def __init__(self, identity: Identity, own: list[Finding]) -> None:
        self.identity, self.main, self.messages = identity, identity.rank == 0, 0
        self.own = own
        """What this rank has found, until rank 0 has printed it."""
        self.states: Counter[State] = Counter()
        """Of the lines that were printed."""
        self.errors = set[str]()
        """The checks that found one."""

    def meet(self, timeout: timedelta) -> None:
        """Find the others; *timeout* is the one of the store afterwards, which a process group uses too."""
        self.store = meet(self.identity, MEETING)
        self.store.set_timeout(timeout)

    def gather(self, value: Any, patience: timedelta) -> dict[int, Any]:
        """On rank 0 the *value* of each rank that has sent it before *patience* ends; on others nothing."""
        self.messages += 1
        self.store.set(f"{self.messages}/{self.identity.rank}", json.dumps(value))
        found, until = {}, time.monotonic() + patience.total_seconds()
        for rank in range(self.identity.world_size) if self.main else ():
            key = f"{self.messages}/{rank}"
            with suppress(RuntimeError):  # it has not come
                self.store.wait([key], timedelta(seconds=max(0.1, until - time.monotonic())))
                found[rank] = json.loads(self.store.get(key))
        return found

    def from_main(self, value: Any, patience: timedelta) -> Any:
        """Rank 0's *value* on every rank; a `RuntimeError` where it does not come."""
        self.messages += 1
        key = f"{self.messages}/main"
        if self.main:
            self.store.set(key, json.dumps(value))
        self.store.wait([key], patience)
        return json.loads(self.store.get(key))

    def show(self, patience: timedelta, common: Sequence[Finding] = ()) -> set[str]:
        """Let rank 0 print what each rank has found, and what is *common* to all; returns the checks with errors so far."""
        gathered = self.gather(self.own, patience)
        if self.main:
            if missing := sorted(set(range(self.identity.world_size)) - gathered.keys()):
                text = f"ranks {ranges(missing)} have not reported: look at their hosts, and at what they have printed"
                common = [*common, Finding("ranks", "error", text)]
            self.print({rank: [Finding(*line) for line in lines] for rank, lines in gathered.items()}, common)
        wrong = set(self.from_main(sorted(self.errors), patience))
        self.own = []
        return wrong

    def print(self, found: Mapping[int, Iterable[Finding]], common: Iterable[Finding] = ()) -> None:
        """Print what some ranks *found*, equal lines once, and what is *common* to all."""
        at: dict[Finding, list[int]] = {}
        for rank, lines in found.items():
            for one in lines:
                at.setdefault(one, []).append(rank)
        for one in common:
            at[one] = []
        order = list(dict.fromkeys(one.check for one in at))
        for one in sorted(at, key=lambda one: order.index(one.check)):
            where = ""
            if self.identity.world_size > 1 and at[one]:
                where = f"rank{'s' if len(at[one]) > 1 else ''} {ranges(at[one])}: "
            print(f"{one.state:<8}{one.check:<14}{where}{one.text}", flush=True)
            self.states[one.state] += 1
        self.errors |= errors(at)

    def end(self) -> Exit:
        """Print how many lines need something to be done; returns the exit code."""
        counts = [f"{self.states[state]} {state}{'s' * (self.states[state] != 1)}" for state in ("error", "warning")]
        print(", ".join(counts), flush=True)
        return Exit.MISTAKE if self.states["error"] else Exit.DONE


def together(here: Here, ranks: Ranks) -> int:
    """What follows where the ranks have met, and each has looked at itself; returns the exit code."""
    config = here.config
    patience = timedelta(seconds=config.limits.start or 24 * 3600.0)
    facts = ranks.gather(placement.facts(here), MEETING)
    compared = [one for name, check in COMPARED.items() if facts for one in examine(name, partial(check, facts))]
    wrong = ranks.show(MEETING, compared)
    if not wrong & {"ranks", "recipe"}:
        # Rank 0 first: it downloads and indexes what is missing.
        ranks.own = files(here) if ranks.main else []
        ranks.from_main(None, patience)
        if here.first and not ranks.main:
            ranks.own = files(here)
        wrong = ranks.show(patience)
    folder = ""
    if reasons := sorted(wrong & (NEEDED_TO_MEET | NEEDED_TO_TRAIN)):
        text = f"not made after errors in {', '.join(reasons)}: correct these first"
        ranks.show(patience, [Finding("dry run", "warning", text)])
    else:
        folder = ranks.from_main(dry_run.scratch(config) if ranks.main else "", patience)
    if not wrong & NEEDED_TO_MEET:
        try:
            ranks.own = joined(here, Path(folder) if folder else None)
        finally:
            # Where a fault ends other ranks, this one may be the only one that is left.
            if folder and (ranks.main or errors(ranks.own)):
                shutil.rmtree(folder, ignore_errors=True)
        ranks.show(LAST)
    code = ranks.from_main(ranks.end() if ranks.main else 0, LAST)
    ranks.gather(None, LAST)  # rank 0 may hold the store
    return code


def files(here: Here) -> list[Finding]:
    """The data and `out`, as this rank sees them."""
    classes: list[str] = []
    found = examine("data", partial(dry_run.data, here, classes))
    return found + examine("out", partial(dry_run.out, here, classes))


def joined(here: Here, folder: Path | None) -> list[Finding]:
    """What shows only in a process group. Two steps are taken where there is a *folder* for them. Called on every rank."""
    config, parallel, found = here.config, here.config.parallel, list[Finding]()
    if folder is None and here.identity.world_size == 1:
        return found
    doing = "ranks"
    try:
        with operations_named(), Watchdog(config.limits, folder and folder / "stacks") as watch, ExitStack() as stack:
            timeout = collective_timeout(config.limits)
            runtime = stack.enter_context(start(parallel.device, parallel.replicas, parallel.pipeline_ranks, timeout))
            with watch.naming():
                if runtime.world_size > 1:
                    doing = "all-reduce"
                    found += (Finding(doing, *line) for line in dry_run.all_reduce(runtime))
                if folder is not None:
                    doing = "dry run"
                    found += (Finding(doing, *line) for line in dry_run.steps(config, folder, runtime, watch))
    except (UserError, RankFailure) as error:  # the same on every rank
        found.append(Finding(doing, "error", str(error)))
    except Exception as error:
        traceback.print_exc()  # others may wait for this rank, and end before they can print what it reports
        found.append(Finding(doing, "error", f"{type(error).__name__}: {one_line(error)}"))
    if errors(found):
        gc.collect()  # with the last reference to a process group its connections end, and others stop waiting for this rank
    return found
