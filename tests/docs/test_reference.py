"""docs/configuration.md is what the schema's docstrings say, and a key without one is found."""

from __future__ import annotations

import dataclasses

import pytest

from bigvision.config import Config
from bigvision.config.values import leaves
from tests.docs.reference import PAGE, SEE, TASKS, page, rows, with_support


def test_the_reference_of_all_keys_is_up_to_date() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == page(), "run: python -m tests.docs.reference"
    keys = {key for key, _ in leaves(Config)}
    assert all(f"| `{key.rpartition('.')[2]}` |" in written for key in keys)
    assert set(SEE) <= keys


def test_the_table_of_tasks_and_strategies_is_up_to_date() -> None:
    written = TASKS.read_text(encoding="utf-8")
    assert written == with_support(written), "run: python -m tests.docs.reference"


def test_a_key_without_a_docstring_is_found() -> None:
    @dataclasses.dataclass
    class Section:
        told: int = 1
        """Has *markup* | in it."""
        untold: int = 2

    assert next(rows(Section, "a")) == r"| `told` | whole number | `1` | Has \*markup\* \| in it. |"
    with pytest.raises(KeyError, match="untold"):
        list(rows(Section, "a"))
