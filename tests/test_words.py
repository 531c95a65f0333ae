"""A reader who knows torch and timm meets no private words: a list of those that the project once used is kept out of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = {
    "mend": "fix, recover",
    "mends": "fixes",
    "mended": "fixed, recovered",
    "mending": "fixing",
    "spoilt": "non-finite",
    "culprit": "offending sample",
    "culprits": "offending samples",
    "accuse": "diagnose",
    "accused": "diagnosed",
    "accuses": "diagnoses",
    "suspect": "diagnosis",
    "suspects": "diagnosis",
    "absentee": "missing rank",
    "absentees": "missing ranks",
    "whereabouts": "location",
    "room": "package, slot, space",
    "rooms": "packages, slots",
    "lest": "so that ... not",
}
"""Each with what to write instead."""
PHRASES = {r"for want of": "for lack of", r"\bso many\b.{1,80}\bso many\b": "as many ... as"}
ALLOWED = {
    "bigvision/engine/step.py": {"culprits"},  # `StepResult.culprits` keeps working, with a warning
}
"""Where a public name of an earlier version is still read."""
FILES = (".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".cff")


def texts() -> list[str]:
    """The project's own text files, but this one."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    named = [name for name in listed if name.endswith(FILES) or name in ("Makefile", "Dockerfile")]
    return [name for name in named if name != "tests/test_words.py" and not name.startswith("tests/training/runs/")]


def found(text: str) -> list[tuple[int, str]]:
    """The words of the list in *text* with their lines, also as parts of a name (``room_for``, ``RoomFor``)."""
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", line)
        lines += [(number, part.lower()) for part in parts if part.lower() in WORDS]
        lines += [(number, phrase) for phrase in PHRASES if re.search(phrase, line)]
    return lines


@pytest.mark.parametrize(
    "text", ["mend = 1", "no room for it", "class RoomFull", "SUSPECTS", "lest it fail", "so many a, so many b"]
)
def test_a_private_word_is_found(text: str) -> None:
    assert found(text)


@pytest.mark.parametrize("text", ["recommend", "classroom", "the fastest", "so many of them"])
def test_a_part_of_another_word_is_not(text: str) -> None:
    assert not found(text)


def test_no_private_words() -> None:
    wrong = []
    for name in texts():
        for line, word in found((ROOT / name).read_text()):
            if word not in ALLOWED.get(name, set()):
                wrong.append(f"{name}:{line}: {word}: write {WORDS.get(word) or PHRASES[word]}")
    assert not wrong, "\n".join(wrong)
