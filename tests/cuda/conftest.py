"""Tests of this folder need a CUDA device, and are skipped by name without one; see runs.py for the switch to the CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cuda.jobs import Job, Jobs
from tests.cuda.runs import SWITCH, cuda_devices, on_cpu

HERE = Path(__file__).parent
JOBS = pytest.StashKey[Jobs]()
FIGURES: list[str] = []
"""What was measured, for the end of the output."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "job(job): what a test of tests/cuda reads the result of; see tests/cuda/jobs.py")
    config.addinivalue_line("markers", "devices(n): needs n CUDA devices")


@pytest.hookimpl(tryfirst=True)  # before markers are chosen by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = cuda_devices()
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker("alone")
        wanted = next((mark.args[0] for mark in item.iter_markers("devices")), 1)
        if there < wanted:
            name = getattr(item, "originalname", item.name)
            devices = "a CUDA device" if wanted == 1 else f"{wanted} CUDA devices"
            item.add_marker(pytest.mark.skip(reason=f"{name} needs {devices}; {SWITCH}=cpu runs it on the CPU"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the jobs of all tests that will run."""
    chosen = [item for item in session.items if HERE in item.path.parents and not _skipped(item)]
    wanted: list[Job] = [mark.args[0] for item in chosen for mark in item.iter_markers("job")]
    if wanted and not session.config.option.collectonly:
        session.config.stash[JOBS] = jobs = Jobs()
        jobs.start(wanted)


def _skipped(item: pytest.Item) -> bool:
    marks = [*item.iter_markers("skip"), *(mark for mark in item.iter_markers("skipif") if mark.args and mark.args[0])]
    return bool(marks)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if (jobs := session.config.stash.get(JOBS, None)) is not None:
        jobs.close()
        if exitstatus == 0:  # else the runs are there to look at
            shutil.rmtree(jobs.folder, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    jobs = config.stash.get(JOBS, None)
    if jobs is None:
        return
    terminalreporter.section("measured on the CPU, which says nothing of a GPU" if on_cpu() else "measured")
    for line in FIGURES:
        terminalreporter.line(line)
    for key, seconds in sorted(jobs.times.items(), key=lambda pair: -pair[1])[:8]:
        terminalreporter.line(f"{seconds:6.1f} s  {key.removeprefix('tests.cuda.')}")


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """What a job that the test declares has returned: ``results(function, *arguments)``."""
    return request.config.stash[JOBS].result


@pytest.fixture
def figure() -> Iterator[Callable[[str], None]]:
    """Keeps a line for the end of the output."""
    yield FIGURES.append
