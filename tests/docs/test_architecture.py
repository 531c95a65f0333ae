"""docs/architecture.md lists each file of the package, and each function that its walks name is where they say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.docs.blocks import ROOT

PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "bigvision"
"""Paths on the page are below it."""
ROW = re.compile(r"^\| `([\w/]+\.py)` \|", re.MULTILINE)
STOP = re.compile(r"`([\w/]+\.py): ([\w.]+)`")


def defines(path: Path, dotted: str) -> bool:
    """Whether the module *path* defines the class, function or method *dotted*."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for name in dotted.split("."):
        found = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name]
        if not found:
            return False
        body = found[0].body
    return True


def mistakes(text: str) -> list[str]:
    """What is wrong with a page: files that it lacks, lists twice or invents, and functions that do not exist."""
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")}
    rows = ROW.findall(text)
    found = [f"{file}: not in a table" for file in sorted(files - set(rows))]
    found += [f"{file}: in the tables {rows.count(file)} times" for file in sorted(set(rows)) if rows.count(file) > 1]
    found += [f"{file}: no such file" for file in sorted({*rows, *(file for file, _ in STOP.findall(text))} - files)]
    found += [f"{file}: no {name}" for file, name in STOP.findall(text) if file in files and not defines(PACKAGE / file, name)]
    return found


def test_a_reader_finds_every_file_and_every_function_that_the_page_names() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert mistakes(text) == []
    assert len(STOP.findall(text)) > 50


def test_a_file_or_function_that_moved_is_found() -> None:
    text = PAGE.read_text(encoding="utf-8")
    row = "| `cli.py` | The program."
    text = text.replace("| `cli.py` |", "| `old.py` |", 1).replace("NativeStep.update`", "NativeStep.upgrade`", 1)
    text = text.replace("## One batch", f"{row} |\n{row} |\n\n## One batch").replace("api.py: Engine`", "gone.py: Engine`", 1)
    assert mistakes(text) == [
        "cli.py: in the tables 2 times",
        "gone.py: no such file",
        "old.py: no such file",
        "engine/step.py: no NativeStep.upgrade",
    ]
    assert mistakes(PAGE.read_text(encoding="utf-8").replace("| `cli.py` |", "| cli |")) == ["cli.py: not in a table"]
