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

import yaml

from tests.distributed import start_ranks

LIMIT = 4.0
PATIENCE = 90.0
"""Seconds for the start of ranks on a busy machine."""


def stop() -> None:
    """Stop this process, all of its threads, until SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def loop_for_ever() -> None:
    while True:
        pass


def sleep_for_ever() -> None:
    time.sleep(10_000)


def fail() -> None:
    raise ValueError("planted in one rank")


def hold_the_interpreter() -> None:
    """Native code that never lets go of it."""
    import ctypes

    ctypes.PyDLL(None).sleep(10_000)


def at(place: str, act: Callable[[], None], mark: Path) -> None:
    """Have this process do *act* when it comes to *place*; *mark* then has the time."""
    from bigvision.checkpoint import background
    from bigvision.data import loader
    from bigvision.engine.data_parallel import DataParallelEngine
    from bigvision.training import build

    homes: dict[str, tuple[Any, str, int]] = {
        "start": (build, "build_engine", 1),
        "step": (DataParallelEngine, "train_step", 3),
        "data": (loader.Batches, "__next__", 3),
        "evaluate": (DataParallelEngine, "eval_step", 2),
        "save": (background.Saver, "save", 1),
        "commit": (background, "commit", 1),
    }
    home, name, number = homes[place]
    before, calls = getattr(home, name), 0

    def sabotaged(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            mark.write_text(str(time.time()))
            act()
        return before(*args, **kwargs)

    setattr(home, name, sabotaged)


def train(folder: Path, place: str, act: Callable[[], None], victim: int) -> None:
    """The command line on this rank; what it says goes to a file."""
    from bigvision.cli import main

    rank = int(os.environ["RANK"])
    said = os.open(folder / f"said-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if rank == victim:
        at(place, act, folder / "mark")
    sys.exit(main(["train", str(folder / "recipe.yaml")]))


@dataclass
class Ended:
    """What is left of a run in which one rank did not get on."""

    codes: list[int | None]
    """None: it has not ended."""
    said: list[str]
    errors: list[str]
    """The last line that begins with "error: ", of each rank."""
    after: float
    """Seconds from the act to the end of the last of the others."""
    processes: list[BaseProcess]


def run_and_hang(folder: Path, plain: dict[str, Any], place: str, act: Callable[[], None], victim: int, ranks: int) -> Ended:
    """Train on *ranks* ranks, of which *victim* does *act* at *place*; returns when the others have ended."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(plain))
    processes = start_ranks(train, ranks, folder, place, act, victim)
    others = [process for rank, process in enumerate(processes) if rank != victim]
    deadline = time.monotonic() + PATIENCE
    while (left := [p.sentinel for p in others if p.is_alive()]) and time.monotonic() < deadline:
        wait(left, 0.2)
    end = time.time()
    mark = folder / "mark"
    after = end - float(mark.read_text()) if mark.exists() else -1.0
    said = [path.read_text() if path.exists() else "" for path in (folder / f"said-{rank}" for rank in range(ranks))]
    errors = [next((line for line in reversed(text.splitlines()) if line.startswith("error: ")), "") for text in said]
    return Ended([process.exitcode for process in processes], said, errors, after, processes)


def clean_up(processes: list[BaseProcess]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            process.kill()
        process.join()
