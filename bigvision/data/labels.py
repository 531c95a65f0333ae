"""What the labels of a dataset mean: which classes there are, in which order, and the class of each sample.

Whole numbers from 0 on are classes themselves. Other whole numbers (from 1 on, or with large gaps) are mapped to 0, 1, 2, ...
in their order, and their texts become the classes' names. Everything else is a name; names are sorted. A list of classes that
is known before (the training data's, a class file's) always decides. Labels that do not fit are a `UserError`, which begins
with *key* and names *where* they are.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Hashable, Iterator, Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from bigvision.errors import UserError

CLASS_FILES = ("classes.txt", "classnames.txt")
BYTE_ORDER_MARKS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16", b"\xef\xbb\xbf": "utf-8-sig"}
WHOLE = re.compile(r"-?[0-9]{1,40}")
"""A label that is a whole number; the longest of 64 bits has 20 digits."""
SHOWN = 5
"""Examples in a message."""

Target = Literal["label", "labels", "numbers", "mask", "none", "any"]
"""What the samples of a source have: a label each, several labels, numbers that are no classes, a mask of labels, nothing; or,
of a dataset from Python, whatever it gives."""
OTHER_TASKS: dict[str, tuple[str, str]] = {
    "labels": ("several labels for an image", "use task.name: multilabel, or keep one of them"),
    "numbers": ("numbers that are no classes", "use task.name: regress, or whole numbers or names"),
    "none": ("no labels", "add labels, or name the column that has them"),
}
"""What training for a label cannot take, and what to do instead."""


class Labels(NamedTuple):
    """The labels of different values or of samples."""

    classes: list[str]
    values: np.ndarray
    """int64 (N,): of each value or sample the place of its class in *classes*"""
    notes: tuple[str, ...] = ()
    """What the user should know of how they were found, to be reported at the start."""


class Coded(NamedTuple):
    """A column of labels as they are stored: the different values, and for each sample which of them it has."""

    distinct: list[Any]
    codes: np.ndarray
    """int64 (N,)"""


def not_a_label(target: Target, example: str, where: str) -> str:
    """What is wrong with data that has another *target* than a label for each image."""
    what, instead = OTHER_TASKS[target]
    return f"{where} has {what}{f' ({example})' if example else ''}; {instead}"


def other_task(target: Target, example: str, *, key: str, where: str) -> UserError:
    return UserError(f"{key}: {not_a_label(target, example, where)}")


def coded(labels: Any) -> Coded:
    """Return the column *labels*: a one-dimensional array, or a list of values that hash. Raises `TypeError` for others."""
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "biufUS":
        distinct, codes = np.unique(labels, return_inverse=True)
        return Coded(distinct.tolist(), codes.reshape(-1).astype(np.int64))
    return Coded(*_distinct([value.item() if isinstance(value, (np.generic, Tensor)) else value for value in labels]))


def joined(columns: Sequence[Coded]) -> Coded:
    """The labels of *columns*, one after the other."""
    distinct, codes = _distinct([value for column in columns for value in column.distinct])
    begins = np.cumsum([0, *(len(column.distinct) for column in columns)])
    return Coded(distinct, np.concatenate([codes[begin + column.codes] for begin, column in zip(begins, columns)]))


def _distinct(values: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
    """The different *values* in the order in which they occur, and which of them each is."""
    # True equals 1 and 1.0, which are other labels.
    numbers: dict[tuple[type, Hashable], int] = {}
    codes = [numbers.setdefault((type(value), value), len(numbers)) for value in values]
    return [value for _, value in numbers], np.array(codes, dtype=np.int64)


def check_all_labelled(column: Coded, where: str, at: Callable[[int], str], key: str) -> None:
    """Raise `UserError`, which names the first sample (*at* calls it by its name), where some have no label."""
    without = [code for code, value in enumerate(column.distinct) if is_missing(value)]
    if not without:
        return
    missing = np.flatnonzero(np.isin(column.codes, without))
    if 0 < len(missing) == len(column.codes):
        raise other_task("none", "", key=key, where=where)
    if len(missing):
        more = f", like {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise UserError(f"{key}: {at(int(missing[0]))} has no label{more}; remove or label it")


def is_missing(value: Any) -> bool:
    """Whether *value* stands for no label: null, not a number, or an empty text."""
    if value is None or isinstance(value, (str, bytes)):
        return not value or not value.strip()
    return isinstance(value, (float, Decimal)) and value != value


def whole(value: Any) -> Any:
    """*value*, as an int where it is a number without a fraction."""
    finite = isinstance(value, (float, Decimal)) and value == value and abs(value) != float("inf")
    return int(value) if finite and value == int(value) else value


def label_samples(
    column: Coded, known: Sequence[str] | None, folders: Sequence[Path] = (), *, key: str, where: str,
    at: Callable[[int], str], places: bool = False,
) -> Labels:  # fmt: skip
    """As :func:`label_by`, of each sample instead of each different value.

    Args:
        at: what messages call a sample.
        places: numbers are places in *known*, also where its names are numbers.
    """
    check_all_labelled(column, where, at, key)
    if known is not None and places:
        distinct = [whole(value) for value in column.distinct]
        numbers = all(isinstance(value, int) for value in distinct)
        values = (by_place if numbers else by_name)(distinct, known, key=key, where=where)
        return Labels(list(known), values[column.codes], from_one(distinct, known) if numbers else ())
    found = label_by(column.distinct, known, folders, key=key, where=where)
    return Labels(found.classes, found.values[column.codes], found.notes)


def label_by(
    distinct: Sequence[Any], known: Sequence[str] | None, folders: Sequence[Path] = (), *, key: str, where: str,
    single: bool = True,
) -> Labels:  # fmt: skip
    """Return the classes, and the label that each of the *distinct* values stands for.

    Args:
        distinct: numbers, truth values, texts or bytes.
        known: the classes. By default those of a class file in *folders*, or else what the values give. Numbers are places in
            that file also where the classes are known, and follow them by name.
        single: one label each is needed: texts that list several are an error.
    """
    if any(is_missing(value) for value in distinct):
        raise UserError(f"{key}: {where} has a sample whose label is empty; remove or label it")
    texts = [_text(value, key, where) for value in distinct]
    file = class_file(folders)
    listed = read_classes(str(file), key) if file is not None else None
    known = listed if known is None else known
    if texts and all(isinstance(value, bool) for value in distinct):
        return _truth_values(texts, known, key, where)
    numbers = [text for text in texts if WHOLE.fullmatch(text)]
    if numbers and len(numbers) < len(texts):
        other = next(text for text in texts if not WHOLE.fullmatch(text))
        raise UserError(f"{key}: {where} has numbers ({numbers[0]}) and names ({other!r}) as labels; use one of them")
    if numbers:
        values = [int(text) for text in numbers]
        if known is None:
            return _dense(values, key, where)
        if listed is None or listed == list(known):
            return _known_numbers(values, known, key, where)
        # Their order may be another.
        own = _known_numbers(values, listed, key, where)
        names = [listed[place] for place in own.values]
        return Labels(list(known), by_name(names, known, key=key, where=f"{where}, named by {str(file)!r},"), own.notes)
    if single and known is None and (several := next(_several(texts), None)) is not None:
        raise other_task("labels", several[:60], key=key, where=where)
    classes = list(known) if known is not None else sorted(set(texts))
    return Labels(classes, by_name(texts, classes, key=key, where=where), lookalikes(classes) if known is None else ())


def class_file(folders: Sequence[Path]) -> Path | None:
    """The file with the classes in one of *folders*, the first that is there."""
    return next((folder / name for folder in folders for name in CLASS_FILES if (folder / name).is_file()), None)


def by_name(names: Sequence[str], classes: Sequence[str], *, key: str, where: str) -> np.ndarray:
    """Return the place of each of *names* in *classes*, int64."""
    labels = {name: label for label, name in enumerate(classes)}
    missing = next((name for name in names if name not in labels), None)
    if missing is not None:
        raise UserError(f"{key}: class {missing!r} in {where} is not one of the {len(classes)} classes; remove or name it")
    return np.array([labels[name] for name in names], dtype=np.int64)


def by_place(values: Sequence[int], classes: Sequence[str], *, key: str, where: str) -> np.ndarray:
    """Return *values*, which are places in *classes*, int64."""
    wrong = next((value for value in values if not 0 <= value < len(classes)), None)
    if wrong is not None:
        if min(values) > 0 and max(values) == len(classes):
            fix = "labels count from 0: subtract 1, write names, or leave out the list of classes, so that numbers are names"
        elif wrong < 0:
            fix = "remove or label those samples"
        else:
            fix = "correct it or the classes"
        raise UserError(f"{key}: {where} has label {wrong}, but labels are 0 to {len(classes) - 1}; {fix}")
    return np.array(values, dtype=np.int64)


def read_classes(file: str, key: str) -> list[str]:
    """The classes in *file*, in the order of their labels: a name on each line, a JSON list, the label of each name
    (``{"tench": 0, ...}``), or ImageNet's class index (``{"0": ["n01440764", "tench"], ...}``), of which the first names count.
    """
    try:
        text = decoded(Path(file).expanduser().read_bytes())
        if text.lstrip()[:1] in ("[", "{"):
            found = json.loads(text)
            if isinstance(found, dict):
                if all(type(label) is int for label in found.values()):
                    names_of = {label: name for name, label in found.items()}
                    found = {str(label): names_of[label] for label in range(len(found))}
                found = [found[str(label)] for label in range(len(found))]
            names = [name[0] if isinstance(name, list) else name for name in found]
        else:
            names = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    except OSError as error:
        raise UserError(f"{key}: {file!r} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{key}: {file!r} is no list of names and no class index from 0 on ({error})") from error
    if not names or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        twice = next((name for place, name in enumerate(names) if isinstance(name, str) and name in names[:place]), None)
        raise UserError(f"{key}: {file!r} must name each class once{f', not {twice!r} again' if twice is not None else ''}")
    return names


def decoded(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, as Windows writes it. Raises `ValueError`."""
    coding = next((coding for mark, coding in BYTE_ORDER_MARKS.items() if content.startswith(mark)), "utf-8")
    return content.decode(coding)


def _text(value: Any, key: str, where: str) -> str:
    """A label's text."""
    value = whole(value)
    if isinstance(value, (str, bool, int)):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{key}: the label {value[:20]!r} in {where} is no text in UTF-8; write it as one") from error
    if isinstance(value, (float, Decimal)):
        raise other_task("numbers", str(value), key=key, where=where)
    if isinstance(value, (list, tuple)):
        raise other_task("labels", ", ".join(map(str, value[:SHOWN])), key=key, where=where)
    raise UserError(f"{key}: the labels of {where} are {type(value).__name__}; use whole numbers or names")


def _truth_values(texts: list[str], known: Sequence[str] | None, key: str, where: str) -> Labels:
    names = ["False", "True"]
    classes = list(known) if known is not None else names
    # A class file of two names names them; otherwise they have names already.
    listed = names if len(classes) == 2 and not set(names) & set(classes) else classes
    return Labels(classes, by_name(texts, listed, key=key, where=where))


def _dense(values: list[int], key: str, where: str) -> Labels:
    """Of whole numbers that alone say which classes there are."""
    present = sorted(set(values))
    low, high = present[0], present[-1]
    if low < 0:
        raise UserError(f"{key}: {where} has label {low}, but labels are 0 or more; remove or label those samples")
    if low == 0 and high < 2 * len(present):
        classes = [str(label) for label in range(high + 1)]
        absent = [str(label) for label in sorted(set(range(high + 1)).difference(present))]
        notes = (f"no sample has label {_some(absent)}, which stays a class of its own",) if absent else ()
        return Labels(classes, np.array(values, dtype=np.int64), notes)
    place = {value: label for label, value in enumerate(present)}
    if high - low + 1 == len(present):
        note = f"labels {low} to {high} become 0 to {len(present) - 1}; the classes keep their names '{low}' to '{high}'"
    else:
        begin = _some([f"{value} is {label}" for value, label in place.items()])
        note = f"{len(present):,} labels from {low} to {high} become 0 to {len(present) - 1} in their order: {begin}"
    return Labels([str(value) for value in present], np.array([place[value] for value in values], dtype=np.int64), (note,))


def numbered(classes: Sequence[str]) -> bool:
    """Whether the names of *classes* are whole numbers in their order, so that a number is a name."""
    numbers = [int(name) for name in classes if WHOLE.fullmatch(name)]
    return len(numbers) == len(classes) and all(one < other for one, other in pairwise(numbers))


def _known_numbers(values: list[int], known: Sequence[str], key: str, where: str) -> Labels:
    """Of whole numbers where the classes are known: names, or else places in the list."""
    classes = list(known)
    if numbered(classes):
        names = {int(name): name for name in classes}
        return Labels(classes, by_name([names.get(value, str(value)) for value in values], classes, key=key, where=where))
    places, notes = by_place(values, classes, key=key, where=where), ()
    if all(WHOLE.fullmatch(name) for name in classes) and any(classes[value] != str(value) for value in values):
        notes = (f"labels are places in the list of classes, not their names: label {values[0]} is {classes[values[0]]!r}",)
    return Labels(classes, places, notes or from_one(values, classes))


def from_one(values: Sequence[int], classes: Sequence[str]) -> tuple[str, ...]:
    """A note where *values*, which are places in *classes*, may count from 1."""
    if 0 in values or 1 not in values:
        return ()
    return (f"no sample has label 0, which is {classes[0]!r}: labels are taken to count from 0, so that 1 is {classes[1]!r}",)


def _several(texts: Sequence[str]) -> Iterator[str]:
    """Those of *texts* that list several labels: "[1, 2]", or "a|b" where "a" is a label too or also stands elsewhere."""
    single, places = set(texts), dict[str, int]()
    for text in texts:
        if text[:1] == "[" and text[-1:] == "]":
            yield text
        for separator in "|;,":
            parts = [part.strip() for part in text.split(separator)]
            if len(parts) < 2 or not all(parts):
                continue
            alone = [part in single for part in parts]
            # A taxonomy has each of its parts in one place, and names of species have commas in them.
            elsewhere = separator != "," and any(places.setdefault(part, place) != place for place, part in enumerate(parts))
            if all(alone) or elsewhere or (any(alone) and separator != ","):
                yield text


def lookalikes(classes: Sequence[str]) -> tuple[str, ...]:
    """A note of classes whose names differ in nothing that can be seen at a glance."""
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), name)
        if other != name:
            return (f"classes {other!r} and {name!r} are two, though their names differ only in case, spaces or accents",)
    return ()


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:SHOWN]) + (", ..." if len(texts) > SHOWN else "")
