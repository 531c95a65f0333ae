from pathlib import Path

import pytest

ALONE = {"benchmarks", "launch", "launchers", "runtime", "training"}
"""Folders of tests that wait for programs and signals within a few seconds: beside others these limits would run out."""


@pytest.hookimpl(tryfirst=True)  # before markers are chosen by -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).parts[0] in ALONE:
            item.add_marker("alone")
