import gc
from pathlib import Path

import pytest

ALONE = ("runtime/test_watchdog.py", "runtime/test_two_hosts.py", "planning/test_plan_time.py")
"""Files of tests whose ranks have limits of a few seconds, which could run out beside other tests, or that measure times."""

LONGEST = (
    "engine/test_parity.py",
    "models/test_build.py",
    "launchers/test_scripts.py",
    "engine/test_pipeline.py",
    "engine/test_zero.py",
    "engine/test_as_on_cuda.py",
    "launch/test_launchers.py",
    "launchers/test_train.py",
    "checkpoint/test_export.py",
    "checkpoint/test_crashes.py",
    "engine/test_frozen.py",
    "training/test_data.py",
    "checkpoint/test_disk_errors.py",
    "engine/test_precision.py",
    "cli/test_mistakes.py",
    "training/test_numbers.py",
    "launchers/test_submit.py",
)
"""Files that take 20 s and more. They run first: one that starts last would keep one core busy and the others idle."""

FOLDER = Path(__file__).parent


def needs_the_machine(path: Path) -> bool:
    """Whether the tests in the file *path* run alone."""
    return path.as_posix().endswith(tuple(f"tests/{name}" for name in ALONE))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the files of which ``-m`` chooses no test: importing all of them takes ten seconds."""
    chosen = config.getoption("markexpr")
    if "alone" not in chosen or not collection_path.name.startswith("test_"):
        return None
    return True if needs_the_machine(collection_path) == ("not alone" in chosen) else None


@pytest.hookimpl(tryfirst=True)  # before markers are chosen by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {FOLDER / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    for item in items:
        if needs_the_machine(item.path):
            item.add_marker("alone")


def pytest_collection_finish() -> None:
    gc.freeze()  # a million objects of imported packages, which no collection need look through
