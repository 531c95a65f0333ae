"""The fenced blocks of Markdown documents, and what can be checked of a document without running it."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from bigvision.cli import COMMANDS
from bigvision.config import Config, resolve
from bigvision.config.values import leaves
from bigvision.errors import UserError

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("launch/*/*.md")])]

LANGUAGES = ("sh", "python", "yaml", "json", "text")
"""``sh`` and ``python`` are run, ``yaml`` is a recipe or sections of one, ``text`` shows files and output."""
MARK = r"(?:<!-- not run: (?P<reason>.+?) -->\n)?"
FENCE = re.compile(MARK + r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
KEYS = {name for name, _ in leaves(Config)}
FOLDERS = ("benchmarks", "bigvision", "docs", "ds_configs", "launch", "recipes", "tests")
CHECKPOINT = ("list", "verify", "diff", "prune")


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


def problems(document: Path) -> list[str]:
    """What is wrong with *document*: a line for each block that cannot be right, and for each name that does not exist."""
    text = document.read_text(encoding="utf-8")
    found = [f"{block}: {problem}" for block in blocks(document) for problem in _of_block(block)]
    if len(re.findall(r"^ *```", text, re.MULTILINE)) != 2 * len(blocks(document)):
        found.append(f"{document.name}: a fence that is not closed, is indented, or has more than a language behind it")
    return found + [f"{document.name}: {problem}" for problem in (*_of_prose(text), *_of_links(document, text))]


def _of_block(block: Block) -> Iterator[str]:
    if block.language not in LANGUAGES:
        yield f"the language is {block.language!r}, not one of {LANGUAGES}"
    try:
        if block.language == "python":
            ast.parse(block.text)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            resolve(yaml.safe_load(block.text), [])
        elif block.language == "sh":
            done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
            yield from done.stderr.splitlines()
            for command in commands(block.text):
                yield from _of_command(command)
    except (SyntaxError, ValueError, yaml.YAMLError, UserError) as error:
        yield f"{type(error).__name__}: {error}"


def commands(text: str) -> list[list[str]]:
    """The words of each command of a ``sh`` block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _of_command(words: list[str]) -> Iterator[str]:
    """A command's flags exist and take their values, and so do the commands and files of this project that it names."""
    dotted = [n for n, word in enumerate(words) if re.match(r"--[a-z_]+\.[a-z_]|--(out|seed)(=|$)", word)]
    try:
        resolve({}, [word for n in dotted for word in (words[n : n + 1] if "=" in words[n] else words[n : n + 2])])
    except UserError as error:
        yield f"{' '.join(words)}: {error}"
    known_to = {"bigvision": COMMANDS, "bigvision.cli": COMMANDS, "checkpoint": CHECKPOINT, "make": _targets()}
    for program, known in known_to.items():
        named = words[words.index(program) + 1] if program in words[:-1] else None
        if named not in (None, "--version", *known):
            yield f"{program} has no command {named}"
    if words[0] == "bigvision":
        source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "bigvision").rglob("*.py"))
        for flag in (word.partition("=")[0] for word in words if re.match(r"--[a-z][a-z-]*(=|$)", word)):
            if f'"{flag}"' not in source and flag[2:] not in KEYS:
                yield f"{' '.join(words)}: no flag {flag}"
    for word in words:
        if re.match(rf"({'|'.join(FOLDERS)})/", word) and not (ROOT / word).exists():
            yield f"{' '.join(words)}: no file {word}"


def _targets() -> list[str]:
    return re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def _of_prose(text: str) -> Iterator[str]:
    """Names between backquotes: flags, keys, commands and files of this project."""
    prose = FENCE.sub("", text)
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    files = "csv|jsonl?|onnx|py|safetensors|sbatch|tsv|yaml"
    for code in re.findall(r"`([^`\n]+)`", prose):
        for key in re.findall(rf"(?<![\w./-])(?:--)?((?:{'|'.join(sections)})\.(?!(?:{files})\b)[a-z_]+)(?![\w/.(])", code):
            if key not in KEYS:
                yield f"`{code}`: no key {key}"
        if (match := re.match(r"bigvision ([a-z]+)", code)) and match[1] not in COMMANDS:
            yield f"`{code}`: no such command"
        if re.match(rf"({'|'.join(FOLDERS)})/[\w./-]+$", code) and not (ROOT / code).exists():
            yield f"`{code}`: no such file"


def _of_links(document: Path, text: str) -> Iterator[str]:
    """Links to files of this project, and to headings in them."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        path, _, heading = target.partition("#")
        if re.match(r"[a-z]+:", path):
            continue
        linked = (document.parent / path).resolve() if path else document
        if not linked.exists():
            yield f"a link to {target}: no such file"
        elif heading and heading not in _headings(linked):
            yield f"a link to {target}: no such heading"


def _headings(document: Path) -> list[str]:
    """The headings of *document* as GitHub writes them in links."""
    lines = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines]
