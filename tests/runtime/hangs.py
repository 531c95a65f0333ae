"""Runs whose ranks stop, hang and die at chosen places, as real processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed import start_ranks
from tests.recipes import write

LIMIT = 3.0
PATIENCE = 90.0
"""Seconds for the start of ranks on a busy machine."""


def stop() -> None:
    """Stop this process, all of its threads, until SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_out_of_sight() -> None:
    """As on another host: nobody can look at the process."""
    die()


def loop_for_ever() -> None:
    while True:
        pass


def sleep_for_ever() -> None:
    time.sleep(10_000)


def sleep_a_little() -> None:
    time.sleep(2)


def fail() -> None:
    raise ValueError("planted in one rank")


def fail_and_block() -> None:
    """Fail, and then wait for the others while cleaning up, as NCCL does when its communicators are destroyed."""
    from bigvision.runtime import process

    process.dist.destroy_process_group = sleep_for_ever
    fail()


def hold_the_interpreter() -> None:
    """Native code that never releases the interpreter lock."""
    import ctypes

    ctypes.PyDLL(None).sleep(10_000)


def hold_under_nohup() -> None:
    """As :func:`hold_the_interpreter`, in a run that nohup has started (see :func:`train`)."""
    hold_the_interpreter()


def wait_in_the_driver() -> None:
    """Native code that releases the lock and never returns, as NCCL and the driver wait for a rank that is lost."""
    import ctypes

    ctypes.CDLL(None).sleep(10_000)


def at(place: str, act: Callable[[], None], mark: Path, delay: float = 0.0) -> None:
    """Have this process do *act* when it comes to *place*, and *delay* seconds later; *mark* then has the time."""
    from bigvision.checkpoint import commit
    from bigvision.data import loader
    from bigvision.engine import Engine
    from bigvision.monitor import Monitor
    from bigvision.training import build

    homes: dict[str, tuple[Any, str, int]] = {
        "start": (build, "build_engine", 1),
        "step": (Engine, "train_step", 3),
        "data": (loader.Batches, "__next__", 5),  # a step reads two micro-batches: the first of step 3
        "more data": (loader.Batches, "__next__", 6),
        "evaluate": (Engine, "eval_step", 2),
        "save": (commit.Saver, "save", 1),
        "commit": (commit, "commit", 1),
        "end": (Monitor, "farewell", 1),
    }
    home, name, number = homes[place]
    before, calls = getattr(home, name), 0

    def sabotaged(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            time.sleep(delay)
            mark.write_text(str(time.time()))
            act()
        return before(*args, **kwargs)

    setattr(home, name, sabotaged)


def train(folder: Path, place: str, act: Callable[[], None], victim: int, others: Callable[[], None] | None = None) -> None:
    """The command line on this rank; its output goes to a file.

    Args:
        others: what the other ranks do at that place, before *victim* acts, as under CUDA.
    """
    from bigvision.cli import main

    rank = int(os.environ["RANK"])
    said = os.open(folder / f"said-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if act is die_out_of_sight:
        from bigvision.runtime import diagnosis

        seen = diagnosis.this_process
        diagnosis.this_process = lambda: seen() | {"sight": ""}
    if rank == victim:
        at(place, act, folder / "mark", 2.5 if others is not None else 0.0)
    elif others is not None:
        from bigvision.runtime import guard

        guard.needed = lambda: True
        # The tests themselves may run under nohup.
        signal.signal(signal.SIGHUP, signal.SIG_IGN if others is hold_under_nohup else signal.SIG_DFL)
        at(place, others, folder / f"blocked-{rank}", 1.5)  # the ranks know each other by then
    sys.exit(main(["train", str(folder / "recipe.yaml")]))


def train_unless(folder: Path, absent: int) -> None:
    """:func:`train`, but for one rank that never comes."""
    if os.environ["RANK"] != str(absent):
        train(folder, "start", stop, victim=-1)


def run_slowly(plain: dict[str, Any], seconds: float) -> list[float]:
    """:func:`tests.recipes.run`, with a first step that takes so long on rank 0."""
    from bigvision.engine import Engine
    from tests.recipes import run

    train_step = Engine.train_step

    def slow(self: Any, batch: Any) -> Any:
        if self.step == 0 and os.environ["RANK"] == "0":
            time.sleep(seconds)
        return train_step(self, batch)

    with mock.patch.object(Engine, "train_step", slow):
        return run(plain)


@dataclass
class Ended:
    """What is left of a run in which one rank did not get on."""

    folder: Path
    codes: list[int | None]
    """None: it has not ended."""
    after: float
    """Seconds from the act to the end of the last of the others."""
    processes: list[BaseProcess]

    @property
    def said(self) -> list[str]:
        """By each rank, so far: the one that did not get on may end after the others."""
        files = (self.folder / f"said-{rank}" for rank in range(len(self.processes)))
        return [path.read_text() if path.exists() else "" for path in files]

    @property
    def errors(self) -> list[str]:
        """The last line that begins with "error: ", of each rank."""
        return [next((line for line in reversed(text.splitlines()) if line.startswith("error: ")), "") for text in self.said]


def run_and_hang(
    folder: Path, plain: dict[str, Any], place: str, act: Callable[[], None], victim: int, ranks: int,
    in_others: Callable[[], None] | None = None,
) -> Ended:  # fmt: skip
    """Train on *ranks* ranks, of which *victim* does *act* at *place*; returns when the others have ended."""
    write(folder, plain)
    processes = start_ranks(train, ranks, folder, place, act, victim, in_others)
    others = [process for rank, process in enumerate(processes) if rank != victim]
    deadline = time.monotonic() + PATIENCE
    while (left := [p.sentinel for p in others if p.is_alive()]) and time.monotonic() < deadline:
        wait(left, 0.2)
    end = time.time()
    mark = folder / "mark"
    after = end - float(mark.read_text()) if mark.exists() else -1.0
    return Ended(folder, [process.exitcode for process in processes], after, processes)


def clean_up(processes: list[BaseProcess]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            process.kill()
        process.join()


if __name__ == "__main__":
    # As a launcher starts it: the recipe, a place, and the rank that sleeps there.
    from bigvision.cli import main

    _recipe, _place, _victim = sys.argv[1:]
    Path(_recipe).with_name(f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    if os.environ.get("RANK", "0") == _victim:
        at(_place, sleep_for_ever, Path(_recipe).with_name("mark"))
    sys.exit(main(["train", _recipe]))
