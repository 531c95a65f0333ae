"""Values of keys: from YAML text and from flags, checked and spelled; and paths among them."""

from __future__ import annotations

import codecs
import dataclasses
import operator
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from bigvision.config.schema import Config, GroupConfig, LoraConfig, ResizeConfig
from bigvision.errors import UserError, nearest

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?=/|[^/])")
"""``s3://bucket``, and ``s3:/bucket``, which `Path` makes of it."""
PATHS = {
    "out": "checkpoints cannot be written to a URL yet: write to a local or mounted folder, and copy it when the run has ended",
    "model.weights": "weights are not read from URLs: download the file and name it, or use model.pretrained",
    "task.teacher": "weights are not read from URLs: download the folder and name it, or a timm model",
    "data.root": "datasets are not read from URLs: name a local or mounted folder",
    "data.classes": "it is not read from a URL: download the file and name it",
    "data.trace": "it cannot be written to a URL: name a local file",
    "parallel.deepspeed": "it is not read from a URL: download the file and name it",
    "checkpoint.resume": "checkpoints are not read from URLs yet: download the step folder and name it",
}
"""The keys whose values are paths, and why none can be a URL."""
AUTO = "auto"
"""The value of ``out`` that is made of recipe, model and data."""
LONGEST = 120
"""Characters of a folder that is made here; file systems allow 255."""
GENERAL = {"train", "training", "val", "valid", "validation", "test", "images", "imgs", "image", "data", "dataset", "shards"}
"""Folders that many datasets have: the one above says which dataset it is."""
OCTAL = re.compile(r"[-+]?0[0-7_]+")
SIXTIES = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")
EXPONENT = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+", re.ASCII)
NO_DATES = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
LISTS: dict[Any, str] = {
    float: "numbers",
    str: "texts",
    GroupConfig: "mappings {match: NAME, lr_scale: 1.0, weight_decay: null}",
    LoraConfig: "mappings {rank: 8, alpha: 16, targets: null}",
    ResizeConfig: "mappings {until: 0.5, image_size: 128}",
}
"""What lists of any length hold, for people."""
NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def local_path(key: str, text: str) -> str:
    """The path *text* with the home folder for ``~`` and values for components such as ``$SCRATCH``."""
    if not text.strip():
        raise UserError(f"{key}: {text!r} names nothing: write a path{', or null' if key not in ('out', 'data.root') else ''}")
    if URL.match(text):
        raise UserError(f"{key}: {text}: {PATHS[key]}")
    if text != text.strip() or not text.isprintable():
        raise UserError(f"{key}: {text!r} begins or ends with a space, or has a character that cannot be seen: remove it")
    path = Path(with_variables(key, text))
    try:
        return str(path.expanduser())
    except RuntimeError:
        raise UserError(f"{key}: {text}: there is no home folder of {path.parts[0]!r}: write the path itself") from None


def with_variables(key: str, text: str) -> str:
    """The path *text* with values for components such as ``$SCRATCH``; a `UserError` where one is not set."""
    parts = []
    for part in text.split("/"):
        if found := re.fullmatch(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", part, re.ASCII):
            name = found[1] or found[2]
            if not os.environ.get(name):
                raise UserError(f"{key}: {text}: the environment variable {name} is not set: set it, or write the path itself")
            part = os.environ[name]
        parts.append(part)
    return "/".join(parts)


def made_out(config: Config, stem: str) -> str:
    """The output folder of a run that names none, a function of the recipe's *stem* ("" without one), data and model."""
    names = [*map(_data_name, config.data.train.split(" + ")), _plain(config.model.name.rpartition("/")[2])]
    # A dict, since a recipe is often called as its data.
    folder = "-".join(dict.fromkeys([stem, *names] if stem else names))
    if not all(names) or len(folder) > LONGEST:
        raise UserError(
            f"out: no folder can be named after data.train: {config.data.train} and model.name: {config.model.name}: "
            "give one, such as --out checkpoints/first"
        )
    return f"checkpoints/{folder}"


def _data_name(spec: str) -> str:
    """The name of one dataset: "pets" for ``0.5*imagefolder:/data/pets/train``."""
    kind, colon, argument = re.sub(r"^\s*[0-9.eE+-]+\s*\*", "", spec).strip().partition(":")
    if not colon or kind == "synthetic":
        return _plain(kind)
    if kind == "python":
        return _plain(argument)
    *above, last = Path(os.path.abspath(Path(argument.partition("?")[0]).expanduser())).parts
    if not _plain(last):
        return ""
    if re.search(r"[*{[]|\.\w{2,8}$", last):
        # Files: shards such as flowers-{000..099}.tar are called flowers.
        last = re.split(r"[*{[]|[-_.]?\d|\.\w{2,8}$", last)[0]
    names = [name for part in (*above, last) if (name := _plain(part))]
    return next((name for name in reversed(names) if name.lower() not in GENERAL), _plain(last))


def _plain(name: str) -> str:
    """*name* with what file systems and shells take alike."""
    return re.sub(r"[^\w.]+", "-", name.rpartition(":")[2]).strip("-._ ")


def leaves(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from leaves(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def get(config: Config, key: str) -> Any:
    return operator.attrgetter(key)(config)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """*config* with these *values* by dotted key."""
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if section:
            name, value = section, dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{name: value})
    return config


def coerce(value: Any, kind: Any, key: str, where: str) -> Any:
    """Return *value*, as YAML gives it, as *kind*; YAML 1.1 reads 1e-3 as text, so numbers in text are accepted."""
    for option in typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,):
        if option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is bool:
            if isinstance(value, bool):
                return value
        elif option is str:
            if isinstance(value, str):
                return value
            if isinstance(value, int) and not isinstance(value, bool):
                return str(value)  # a folder that is called 2024, the step 200
        elif option in (int, float):
            if (number := _number(value, option)) is not None:
                return number
        elif typing.get_origin(option) is tuple:
            parts = typing.get_args(option)
            if isinstance(value, (list, tuple)) and parts[-1] is Ellipsis:
                return tuple(coerce(item, parts[0], f"{key}[{place}]", where) for place, item in enumerate(value))
            if isinstance(value, (list, tuple)) and len(value) == len(parts):
                return tuple(coerce(item, part, key, where) for item, part in zip(value, parts))
        elif dataclasses.is_dataclass(option):
            if isinstance(value, Mapping):
                return _made(value, typing.cast(type, option), key, where)
            if isinstance(value, typing.cast(type, option)):
                return value
        elif isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return dict(value)
    if str in (kind, *typing.get_args(kind)) and isinstance(value, (bool, float)):
        raise UserError(
            f"{key}: {spell(value)} ({where}) is not {kind_name(kind)}: write it in quotes where it is meant as one"
        )
    choices = [choice for choice in typing.get_args(kind) if isinstance(choice, str)]
    hint = nearest(str(value), choices) if choices else ""
    raise UserError(f"{key}: {spell(value)} ({where}) is not {kind_name(kind)}{hint}")


def _made(value: Mapping[Any, Any], kind: type, key: str, where: str) -> Any:
    """A dataclass *kind* with the fields of *value*."""
    kinds = typing.get_type_hints(kind)
    if strange := [name for name in value if name not in kinds]:
        raise UserError(f"{key}: unknown key {str(strange[0])!r} ({where}){nearest(str(strange[0]), kinds)}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in value:
            raise UserError(f"{key}.{field.name} ({where}) is missing: write {kind_name(kinds[field.name])}")
    return kind(**{name: coerce(item, kinds[name], f"{key}.{name}", where) for name, item in value.items()})


def _number(value: Any, kind: type[int] | type[float]) -> float | None:
    """*value* as a number, a whole one where *kind* is int, also 1e4, which YAML 1.1 reads as text; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        if kind is int and (isinstance(value, int) or (isinstance(value, str) and value.isdecimal())):
            return int(value)  # not by way of float, which has 53 bits
        number = float(value)
        return number if kind is float else int(number) if number.is_integer() else None
    except (ValueError, OverflowError):
        return None


def kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        return choices[0] if len(choices) == 1 else "one of " + ", ".join(choices)
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(kind_name(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        return f"a list of {LISTS[parts[0]] if parts[-1] is Ellipsis else f'{len(parts)} numbers'}"
    if typing.get_origin(kind) is dict:
        return "a mapping of names to values"
    if dataclasses.is_dataclass(kind):
        return LISTS[kind].replace("mappings", "a mapping")
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    return names.get(kind, "a value")


def spell(value: Any) -> str:
    """*value* on one line as YAML spells it."""
    if isinstance(value, tuple):
        value = [dataclasses.asdict(item) if isinstance(item, (GroupConfig, ResizeConfig)) else item for item in value]
    elif isinstance(value, LoraConfig):
        value = dataclasses.asdict(value)
    style = {"default_flow_style": True, "width": 10**6, "sort_keys": False}
    text = yaml.safe_dump(value, **style).removesuffix("...\n").strip()
    # Texts with line breaks, and bytes: escaped.
    return " ".join(yaml.safe_dump(value, **style, default_style='"').split()) if "\n" in text else text


def parse_size(text: str, key: str) -> int:
    """Bytes in a size such as ``5GB`` (decimal) or ``512MiB`` (binary)."""
    units = {"B": 1, "": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power}
    number = text.rstrip("BbKkMmGgTtIi ").strip()
    unit = text[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"{key}: {text!r} is not a size: write a number and a unit, such as 5GB or 512MiB")
    return size


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 2024-01-31 is a text: no key takes a date, and folders are often called by one."""

    yaml_implicit_resolvers = NO_DATES


def read_recipe(path: str | Path) -> Mapping[str, Any]:
    """The sections of the recipe *path*."""
    where = f"recipe {path}"
    if URL.match(str(path)):
        raise UserError(f"{where}: recipes are read from files, not from URLs: download it and name the file")
    try:
        content = Path(path).expanduser().read_bytes()
        # UTF-8, with or without a byte order mark, or UTF-16 with one, as some editors on Windows write it.
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line}: not UTF-8 text: save the file as UTF-8") from None
    tree = parse(text, where)
    if tree is None:
        raise UserError(f"{where}: is empty: write sections such as 'model:' and 'train:'")
    if not isinstance(tree, Mapping):
        kind = "a list" if isinstance(tree, list) else f"{tree!r:.60}"
        raise UserError(f"{where}: must hold sections such as 'model:' and 'train:', not {kind}")
    return tree


def parse(text: str, where: str, options: bool = False) -> Any:
    """The value that *text* spells in YAML; *where* begins each message. *options*: it is that of ``model.options``.

    What YAML reads in another way than it looks is a `UserError`: a key that is written twice, an octal or base-60 number.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, where, "", [], options)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {_problem(error)}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())[:200]}") from None


def _check(node: yaml.Node, where: str, key: str, above: list[yaml.Node], options: bool) -> None:
    """Raise `UserError` for what YAML would read without an error, and otherwise than it is meant.

    In ``model.options`` (*options*) let 1e-6 be a number: YAML 1.1 reads it as text, and no option has a type that would tell.
    """
    line = node.start_mark.line + 1
    if any(node is one for one in above):
        raise UserError(f"{where}: line {line}: {key or 'the file'} contains itself: drop the alias")
    above = [*above, node]
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, where, key, above, options)
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
            _check(value, where, inner, above, options or inner == "model.options")
    elif isinstance(node, yaml.ScalarNode) and node.style is None and options and EXPONENT.fullmatch(node.value):
        node.tag = NUMBERS[1]
    elif isinstance(node, yaml.ScalarNode) and node.style is None and node.tag in NUMBERS:
        kind = "octal" if OCTAL.fullmatch(node.value) else "a number to the base 60" if SIXTIES.fullmatch(node.value) else ""
        if kind:
            at = f"{where}: line {line}: {key}" if key else where
            raise UserError(f"{at}: {node.value} is {kind} in YAML: write a plain number, or quote a text")


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


def parse_flags(defaults: Config, flags: list[str], kinds: Mapping[str, Any], prog: str) -> dict[str, Any]:
    """Return the YAML value of each ``--section.key value``; *defaults* are what ``--help`` shows."""
    if not flags:
        return {}
    import tyro  # a fifth of a second, and only flags need it
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    # The text is kept as it was given: only afterwards is it known which key an error has to name.
    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if dataclasses.is_dataclass(info.type):
            return None
        choices = typing.get_args(info.type) if typing.get_origin(info.type) is Literal else ()
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="|".join(choices) or kind_name(info.type).upper().replace(" ", "-"),
            instance_from_str=lambda texts: _Given(texts[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [spell(value)],
        )

    show_help = any(flag in ("-h", "--help") for flag in flags)
    try:
        parsed, unknown = tyro.cli(
            Config,
            prog=prog,
            description="Train a timm model: bigvision train [RECIPE.yaml] [--section.key value ...]. "
            "--resume X is another spelling of --checkpoint.resume X, --deepspeed FILE of --parallel.deepspeed FILE.",
            args=flags,
            default=defaults,
            registry=registry,
            return_unknown_args=True,
            use_underscores=True,
            console_outputs=show_help,
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"flags: a value is missing in {' '.join(flags)!r}: write --section.key value") from None
    if unknown:
        name = unknown[0].split("=")[0]
        known = [f"--{key}" for key in kinds]
        raise UserError(f"unknown {'flag' if name.startswith('-') else 'argument'} {name!r}{nearest(name, known)}")
    given = {key: value.text for key in kinds if isinstance(value := get(parsed, key), _Given)}
    # A folder named 2024 is still a text.
    return {
        key: text if kinds[key] is str or not text else parse(text, f"--{key} {text!r}", key == "model.options")
        for key, text in given.items()
    }


@dataclass(frozen=True)
class _Given:
    text: str
