"""A recipe's text made into plain values, where YAML itself would change or drop something in silence."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bigvision.config.paths import URL
from bigvision.errors import UserError

OCTAL = re.compile(r"[-+]?0[0-7_]+")
SIXTIES = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")
EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+", re.ASCII)
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
NO_DATES = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2024-01-31 is a text: no key takes a date, and folders are often called by one."""

    yaml_implicit_resolvers = NO_DATES


def read_recipe(path: str | Path) -> Mapping[str, Any]:
    """The sections of the recipe *path*.

    Raises:
        UserError: it cannot be read, is no YAML or no mapping of sections, or holds what YAML reads in another way than it
            looks: a key that is written twice, an octal or base-60 number.
    """
    where = f"recipe {path}"
    if URL.match(str(path)):
        raise UserError(f"{where}: recipes are read from files, not from URLs: download it and name the file")
    try:
        text = _decoded(Path(path).expanduser().read_bytes(), where)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    tree = parse(text, where)
    if tree is None:
        raise UserError(f"{where}: is empty: write sections such as 'model:' and 'train:'")
    if not isinstance(tree, Mapping):
        kind = "a list" if isinstance(tree, list) else f"{tree!r:.60}"
        raise UserError(f"{where}: must hold sections such as 'model:' and 'train:', not {kind}")
    return tree


def parse(text: str, where: str, options: bool = False) -> Any:
    """The value that *text* spells in YAML; *where* begins each message.

    Args:
        options: it is that of ``model.options``.

    Raises:
        UserError: as `read_recipe`.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, where, "", [])
        _read_numbers(node if options else _value_at(node, ("model", "options")))
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_problem(error)}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _decoded(content: bytes, where: str) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 with one, as some editors on Windows write it."""
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line}: not UTF-8 text: save the file as UTF-8") from None


def _check(node: yaml.Node, where: str, key: str, above: list[yaml.Node]) -> None:
    """Raise `UserError` for what YAML would read without an error, and otherwise than it is meant."""
    line = node.start_mark.line + 1
    if any(node is one for one in above):
        raise UserError(f"{where}: line {line}: {key or 'the file'} contains itself: drop the alias")
    above = [*above, node]
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, where, key, above)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[tuple[str, str], int] = {}
        for name, value in node.value:
            inner = f"{key}.{name.value}" if key else str(name.value)
            if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                second = name.start_mark.line + 1
                if (first := lines.get((name.tag, name.value))) is not None:
                    at = f"lines {first} and {second}" if first != second else f"line {first}"
                    raise UserError(f"{where}: {inner} is written twice, in {at}: drop one of the two, or join them")
                lines[name.tag, name.value] = second
            _check(value, where, inner, above)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag in NUMBERS:
        kind = "octal" if OCTAL.fullmatch(node.value) else "a number to the base 60" if SIXTIES.fullmatch(node.value) else ""
        if kind:
            at = f"{where}: line {line}: {key}" if key else where
            raise UserError(f"{at}: {node.value} is {kind} in YAML: write a plain number, or quote a text")


def _value_at(node: yaml.Node | None, path: tuple[str, ...]) -> yaml.Node | None:
    for name in path:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for key, value in pairs if key.value == name), None)
    return node


def _read_numbers(node: yaml.Node | None) -> None:
    """Let 1e-6 in *node* be a number, which YAML 1.1 reads as text: a timm option has no kind by which it could be told."""
    if isinstance(node, yaml.MappingNode):
        for _, value in node.value:
            _read_numbers(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _read_numbers(value)
    elif isinstance(node, yaml.ScalarNode) and node.style is None and EXPONENT.fullmatch(node.value):
        node.tag = NUMBERS[1]


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, on one line."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    hint = ""
    if mark is not None and mark.buffer:
        # The scanner often stops behind a tab and reports something else.
        line = mark.buffer[: mark.pointer].rpartition("\n")[2] + mark.buffer[mark.pointer :].partition("\n")[0]
        hint = ": the line begins with a tab: indent with spaces" if re.match(r" *\t", line) else ""
    return (f"line {mark.line + 1}: " if mark is not None else "") + " ".join(str(said).split()) + hint
