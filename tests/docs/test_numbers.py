"""The numbers that documents state: limits, defaults, exit codes and names as the code has them, figures as they were measured.

A statement is found by the words around its number, in whichever document it stands, so that pages may be written anew.
"""

from __future__ import annotations

import ast
import math
import re
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bigvision.cli import COMMANDS
from bigvision.config import Config
from bigvision.config.values import get, leaves, spell
from bigvision.data import DATASETS
from bigvision.engine import STRATEGIES
from bigvision.errors import Exit
from bigvision.pipeline.schedules import SCHEDULES
from tests.docs.blocks import DOCUMENTS, ROOT
from tests.models.zoo import ZOO
from tests.pipeline.test_stages import REFUSED

TEXT = " ".join(re.sub(r"\s+", " ", document.read_text(encoding="utf-8")) for document in DOCUMENTS)
SPELLED = {"a tenth": 0.1, "two": 2, "three": 3, "four": 4, "five": 5, "ten": 10}
KEYS = [name for name, _ in leaves(Config)]
MIB = 1 << 20

# What a document says (the number is the group), the package and the name of the constant that has it, and the number's unit.
CONSTANTS = [
    (r"last ([\d,]+) losses", "training", "WINDOW", 1),
    (r"no verdict before the ([\d,]+)th loss", "training", "LEAST", 1),
    (r"above ([\d.]+) times the \(lower\) median", "monitor", "SLOWER", 1),
    (r"by more than (a tenth|[\d.]+) of a step", "monitor", "SHARE", 1),
    (r"some ([\d,]+) times in the shortest limit", "runtime", "PULSES", 1),
    (r"abort that hangs is given ([\d.]+) s", "runtime", "ABORTING", 1),
    (r"less than ([\d,]+) MB for each rank", "runtime", "SHARED_PER_RANK", MIB),
    (r"After ([\d,]+) graphs for each kind", "engine", "GRAPHS_PER_KIND", 1),
    (r"up to ([\d,]+) MiB of fp32 weights", "engine", "UNIT_OF_CPU", MIB),
    (r"doubled after ([\d,]+) good steps", "engine", "growth_interval", 1),
    (r"fit their devices \(([\d.]+) % of the memory\)", "pipeline", "USABLE", 0.01),
    (r"groups, up to ([\d,]+) MB", "data", "CACHE", MIB),
    (r"headers of ([\d,]+) images", "data", "LOOKED_AT", 1),
    (r"sizes of at most ([\d,]+) of them", "data", "SIZES", 1),
    (r"straight into place, or ([\d,]+) MiB at a time", "models", "CHUNK", MIB),
    (r"slabs of ([\d,]+) MiB", "checkpoint", "SLAB", MIB),
    (r"at most ([\d,]+) of them \(\d+ GiB a rank\)", "checkpoint", "MOST_PINNED", 1),
    (r"whole blocks of ([\d,]+) bytes", "checkpoint", "BLOCK", 1),
    (r"into cells of ([\d,]+) MiB", "checkpoint", "CHUNK", MIB),
    (r"chunks of at most ([\d,]+) MiB", "checkpoint", "CHUNK", MIB),
    (r"up to ([\d,]+) byte ranges \(\d+ MiB\)", "checkpoint", "SAMPLE", 1),
    (r"([\d,]+) s after its last heartbeat", "checkpoint", "SILENT", 1),
    (r"lock, ([\d,]+) s after it", "checkpoint", "EXPIRES", 1),
    (r"--signal=USR1@([\d,]+)`", "launchers", "SIGNAL_SECONDS", 1),
    (r"`--restarts` bounds how often \(([\d,]+)\)", "launchers", "RESTARTS", 1),
]


def number(text: str) -> float:
    return SPELLED[text] if text in SPELLED else float(text.replace(",", ""))


def constants(package: str, name: str) -> set[float]:
    """The numbers that modules and classes of a package call *name*, wherever in the package that is."""
    folder = ROOT / "bigvision" / package
    found = set()
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts))
                found |= {value for one, made in pairs if ast.unparse(one) == name for value in calculated(made)}
    return found


def calculated(node: ast.expr) -> set[float]:
    """The value of ``64 << 20`` and the like; nothing where it is not made of numbers."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return {node.value}
    if isinstance(node, ast.BinOp):
        of = {ast.LShift: lambda a, b: a << b, ast.Mult: lambda a, b: a * b, ast.Pow: lambda a, b: a**b}.get(type(node.op))
        return {of(a, b) for a in calculated(node.left) for b in calculated(node.right)} if of else set()
    return set()


@pytest.mark.parametrize(("pattern", "package", "name", "unit"), CONSTANTS, ids=[f"{row[1]}.{row[2]}" for row in CONSTANTS])
def test_a_limit_in_the_documents_is_that_of_the_code(pattern: str, package: str, name: str, unit: float) -> None:
    stated = {number(match[1]) for match in re.finditer(pattern, TEXT)}
    known = {value / unit for value in constants(package, name)}
    assert stated, f"no document says {pattern!r}: change the row, or take it out where nobody needs to know {package}.{name}"
    assert all(any(map(partial(math.isclose, value), known)) for value in stated), f"{pattern!r}: {stated}, in the code {known}"


def tables() -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each row of each table, with its document and the table's head; cells without emphasis."""
    for document in DOCUMENTS:
        head: list[str] | None = None
        for line in document.read_text(encoding="utf-8").splitlines():
            if not line.startswith("|"):
                head = None
                continue
            cells = [cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if head is None:
                head = cells
            elif not re.fullmatch(r"[-: |]+", line):
                yield document, head, cells


def test_defaults_are_those_of_the_code() -> None:
    """In tables with a column of defaults or of seconds, and where a number stands behind a key, as "(10 s)"."""
    checked, wrong = 0, []
    for document, head, cells in tables():
        column = next((place for place, title in enumerate(head) if title in ("default", "seconds")), None)
        if column is None:
            continue
        names, stated = re.findall(r"`([^`]+)`", cells[0]), re.findall(r"`([^`]+)`", cells[column]) or [cells[column]]
        for name, value in zip(names, stated if len(stated) == len(names) else stated * len(names)):
            known = [spell(get(Config(), key)) for key in KEYS if name in (key, key.rpartition(".")[2])]
            if known:
                checked += 1
                if as_number(value) not in map(as_number, known):
                    wrong.append(f"{document.name}: {name}: {value}, in the code {known}")
    factors = {"million": 1e6, "": 1.0, "s": 1.0}
    for key, stated, unit in re.findall(rf"`({'|'.join(KEYS)})` \(([\d,.]+) ?(million|s|)\b", TEXT):
        checked += 1
        if number(stated) * factors[unit] != get(Config(), key):
            wrong.append(f"`{key}` ({stated} {unit})".rstrip() + f", in the code {get(Config(), key)}")
    assert not wrong, "\n".join(wrong)
    assert checked > 5


def as_number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def test_exit_codes_are_those_of_the_code() -> None:
    known = {int(code) for code in Exit}
    assert {int(code) for code in re.findall(r"exit code (\d+)", TEXT)} <= known
    listed = {int(cells[0]) for _, head, cells in tables() if head[0] == "code" and cells[0].isdigit()}
    assert listed == known, "the table of exit codes"
    for document, head, _ in tables():
        if head[0] == "launcher" and (codes := [title.split()[0] for title in head[1:] if title[:1].isdigit()]):
            assert {int(code) for code in codes} == known, document.name


def test_every_name_that_a_user_can_choose_is_in_the_documents() -> None:
    names = [*STRATEGIES, *SCHEDULES, *DATASETS, *(f"bigvision {command}" for command in COMMANDS)]
    assert [name for name in names if not re.search(rf"[`| ]{re.escape(name)}[`\[: ,]", TEXT)] == []


def test_counts_of_models_and_versions_are_true() -> None:
    untraced = sum(reason == "cannot be traced" for reason in REFUSED.values())
    assert set(re.findall(r"(\d+) modules (?:of timm|trace|needs)|timm's (\d+) (?:model )?modules", TEXT)) <= {
        (str(len(ZOO)), ""), ("", str(len(ZOO))),
    }  # fmt: skip
    assert {tuple(map(int, pair)) for pair in re.findall(r"(\d+) of (?:the|timm's) (\d+) (?:model )?modules", TEXT)} <= {
        (len(ZOO) - untraced, len(ZOO))
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"Python (3\.\d+) or newer", TEXT)) == {project["requires-python"].removeprefix(">=")}
    allowed = re.findall(r"^timm==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    allowed += [one.removeprefix("timm>=") for one in project["dependencies"] if one.startswith("timm>=")]
    assert set(re.findall(r"timm (\d+\.\d+\.\d+)", TEXT)) <= set(allowed)


def test_lines_of_logs_in_the_documents_have_keys_that_the_code_writes() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bigvision").rglob("*.py"))
    lines = re.findall(r'`(\{"[a-z_]+": [^`]*\})`', TEXT)
    keys = {key for line in lines for key in re.findall(r'"([a-z_]+)":', line)}
    assert len(keys) > 5 and [key for key in sorted(keys) if not re.search(rf'"{key}"|\b{key}(=|: )', source)] == []


FIGURE = r"(?<![\w.])\d+\.\d+(?![\w.])"


def test_figures_of_the_readme_are_in_the_measurements() -> None:
    """One page has a figure first."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = [
        section for section in re.split(r"^## ", readme, flags=re.MULTILINE) if "measured" in section.partition("\n")[0]
    ]
    figures = set(re.findall(FIGURE, sections[0]))
    measured = set(re.findall(FIGURE, (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")))
    assert len(sections) == 1 and len(figures) > 5 and sorted(figures - measured) == []


def test_tables_of_measurements_are_what_the_benchmarks_wrote() -> None:
    """Rows with an interval or a rate: all their numbers, rounded as they are, stand in one file of benchmarks/results."""
    results = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "benchmarks" / "results").glob("*.md"))]
    known = [[float(text.replace(",", "")) for text in re.findall(r"(?<![\w.])\d[\d,]*\.?\d*", result)] for result in results]
    checked, wrong = 0, []
    for document, head, cells in tables():
        if not {"95 % interval", "of the ideal (quartiles)", "load, GB/s", "durable save, GB/s"} & set(head):
            continue
        figures = [text for cell in cells[1:] for text in re.findall(FIGURE, cell)]
        checked += len(figures)
        if not any(all(rounded(text, numbers) for text in figures) for numbers in known):
            wrong.append(f"{document.name}: {' | '.join(cells)}")
    assert not wrong, "\n".join(wrong)
    assert checked > 50


def rounded(text: str, numbers: list[float]) -> bool:
    """Whether one of *numbers* is *text* with as many digits, also where its last digit was cut before."""
    step = 10.0 ** -len(text.partition(".")[2])
    return any(abs(float(text) - value) <= 0.5001 * step for value in numbers)
