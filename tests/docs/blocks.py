"""The fenced blocks of a Markdown document, and how they are checked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("sh", "python", "yaml", "text")
"""``sh`` and ``python`` are run, ``yaml`` is read as a recipe, ``text`` shows files and output."""
FENCE = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One block."""

    document: Path
    line: int
    """Of the opening fence, from 1."""
    language: str
    text: str
    reason: str | None
    """Why it is parsed only: ``<!-- not run: REASON -->`` stands before it."""

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """The blocks of *document*, from top to bottom."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(document, line, match["language"], match["text"], match["reason"]))
    return found


def commands(text: str) -> list[str]:
    """The command lines of a ``sh`` block, continued lines joined, comments left out."""
    joined = text.replace("\\\n", " ")
    lines = (re.sub(r"(^|\s+)# .*$", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]
