from pathlib import Path

import pytest

ALONE = {"benchmarks", "launch", "launching", "runtime", "training"}
"""Rooms whose tests wait for programs, signals and limits of a few seconds: beside others they would see those run out."""


@pytest.hookimpl(tryfirst=True)  # before markers are chosen by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in ALONE:
            item.add_marker("alone")
