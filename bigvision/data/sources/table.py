"""Text files that list images and their labels: CSV and TSV as spreadsheets, databases and people write them."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np

from bigvision.data.decode import EXTENSIONS
from bigvision.data.labels import BYTE_ORDER_MARKS, coded, decoded, label_samples, other_task
from bigvision.data.sources.arrow import LABELS, parse_asked, the_only
from bigvision.data.sources.base import Opening, PassedOver, Split
from bigvision.data.sources.folder import ImageFolder
from bigvision.data.splits import choose_files, part, split_name, xxh3_hashes
from bigvision.errors import UserError, nearest, one_line

ASKED = ("path", "label", "split", "root")
"""What may be named after a path's question mark: three columns, and the folder that relative paths start from."""
NAMES = {
    "path": ("path", "image", "img", "file", "filename", "filepath", "file_name", "file_path", "image_path", "image_file",
             "image_name", "img_path", "img_name", "image_id", "photo", "picture", "images"),
    "label": (*LABELS, "class_name", "classname", "label_name", "labelname", "y"),
    "split": ("split", "set", "subset", "partition"),
}  # fmt: skip
"""What columns are called, in lower case and with underscores."""
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar", " ": "space"}
LOOKED_AT = 200
"""Lines from which the dialect and the columns are found."""
FLAGS = {"is_train": ("train", "val"), "is_valid": ("val", "train"), "is_val": ("val", "train"), "is_test": ("test", "train")}
"""Columns of truth values that say whether a row is in a split, and what true and false mean."""
TRUTH = {"true": 0, "1": 0, "1.0": 0, "yes": 0, "false": 1, "0": 1, "0.0": 1, "no": 1}
FOLDS = ("fold", "folds", "kfold", "fold_id")
MISSING = ("", "nan", "null", "n/a", "#n/a", "<na>")
"""Cells, in lower case, that programs write where there is no label."""
DECIMAL_COMMA = re.compile(r"[-+]?[0-9]+(,([0-9]{1,2}|[0-9]{4,}))?")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


Row = tuple[int, list[str]]
"""The number of its last line in the file, and its cells."""


class Listed(NamedTuple):
    """A row that is an image."""

    path: str
    """absolute"""
    label: str
    at: str
    """what messages call the row"""


def open_table(name: str, argument: str, opening: Opening) -> ImageFolder:
    """Open the files *argument* (see :func:`~bigvision.data.splits.choose_files`), which list images.

    A row has the path of an image and its label; columns are named in a header, or found by what they hold, or asked for:
    ``PATH?path=COLUMN&label=COLUMN``, a number where there is no header. Where a column says which split a row is in, rows of
    the other splits are left out. What is held out is so by a hash of the path. *name* is "csv", or "tsv" for files whose
    columns are separated by tabs alone.
    """
    key, split = opening.key, opening.split
    path, asked = parse_asked(argument, key, ASKED)
    chosen = choose_files(path, f".{name}", opening)
    rows: list[Listed] = []
    folders = _Folders()
    passed_over, divided, notes = PassedOver(), False, list[str]()
    for file in chosen.files:
        found, has_split = _listed(file, name == "tsv", split, asked, folders, passed_over, notes, key)
        rows, divided = rows + found, divided or has_split
    if not rows:
        raise UserError(f"{key}: the files of {argument!r} list no images for {split}; add rows")
    label_of: dict[str, str] = {}
    for row in rows:
        if (other := label_of.setdefault(row.path, row.label)) != row.label:
            raise other_task("labels", f"{other} and {row.label}, of {row.path!r}", key=key, where=row.at)
    if again := len(rows) - len(label_of):
        notes.append(f"{again:,} rows list an image again; it counts as often as it is listed")
    where, column = repr(argument), coded(_values([row.label for row in rows]))
    labels = label_samples(column, opening.classes, chosen.folders, key=key, where=where, at=lambda row: rows[row].at)
    root = os.path.commonpath([os.path.dirname(row.path) for row in rows])
    names = [row.path[len(root) :].lstrip(os.sep) for row in rows]
    places, hold_out = np.arange(len(rows)), chosen.hold_out and not divided
    if hold_out:
        # An image that is listed twice is in one part.
        numbers: dict[str, int] = {}
        which = np.array([numbers.setdefault(path, len(numbers)) for path in names])
        _, firsts = np.unique(which, return_index=True)
        otherwise = f"{key}: {where} has one image per class, none can be held out; add images or a val file"
        places = part(xxh3_hashes(map(os.fsencode, numbers)), labels.values[firsts], split, otherwise)
        places = np.flatnonzero(np.isin(which, places))
    files = [(names[place], int(labels.values[place])) for place in places]
    source = ImageFolder(f"{name}:{argument}", root, labels.classes, files)
    source.passed_over, source.linked = passed_over, folders.linked
    source.divided = hold_out and not folders.linked
    if odd := next((one for one in labels.classes if one.casefold() in ("na", "none") and opening.classes is None), None):
        notes.append(f"the label {odd!r} is taken as a class of that name: empty the cell of a row that has no label")
    source.notes = (*notes, *labels.notes)
    return source


def _table(file: Path, tabs: bool, asked: dict[str, str], notes: list[str], key: str) -> tuple[list[str] | None, list[Row]]:
    """The header of *file*, if it has one, and its rows, all of as many cells."""
    text = _text(file, notes, key)
    match = re.match(r"sep=(.)\r?\n", text)  # Excel's
    delimiter = "\t" if tabs else match[1] if match else _delimiter(text)
    text = text[match.end() :] if match else text
    try:
        parsed = _parsed(text, delimiter)
    except csv.Error as error:
        raise UserError(f"{key}: {str(file)!r} is no table of text: {one_line(error)}; write it again") from error
    if not parsed:
        return None, []
    first = parsed[0][1]
    if len(first) < 2:
        raise UserError(
            f"{key}: {str(file)!r} has one column ({first[0][:60]!r}); it needs a path and a label, separated by "
            f"{'tab' if tabs else ', '.join(DELIMITERS.values())}"
        )
    for line, row in parsed:
        while len(row) > len(first) and not row[-1]:
            row.pop()
        if len(row) != len(first):
            raise UserError(
                f"{key}: line {line} of {str(file)!r} has {len(row)} columns, the first {len(first)} (separated by "
                f"{DELIMITERS.get(delimiter, delimiter)}); quote cells that have it in them"
            )
    return (first, parsed[1:]) if _is_header([row for _, row in parsed], asked) else (None, parsed)


def _text(file: Path, notes: list[str], key: str) -> str:
    try:
        content = file.read_bytes()
        marked = content.startswith(tuple(BYTE_ORDER_MARKS))
        odd, even = content[1:200:2].count(0), content[:200:2].count(0)
        if not marked and max(odd, even) > 2 * min(odd, even) + 2:  # UTF-16 without a mark
            return content.decode("utf-16-le" if odd > even else "utf-16-be")
        return decoded(content)
    except OSError as error:
        raise UserError(f"{key}: {str(file)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            raise UserError(f"{key}: {str(file)!r} is no text in UTF-8 ({error.reason}); save it as UTF-8") from error
        notes.append(f"{file.name} is not in UTF-8 and was read as Windows-1252")
        return text


def _parsed(text: str, delimiter: str, strict: bool = True) -> list[Row]:
    """The rows that are not empty, with their line numbers. *strict*: a quote that is not closed is an error."""
    if "\0" in text:
        raise csv.Error("it has zero bytes")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=strict)
    rows = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
    return [(line, row) for line, row in rows if any(row)]


def _delimiter(text: str) -> str:
    """The one that parts the first lines into as many columns each; of several the one that finds known names first."""
    head = "".join(text.splitlines(keepends=True)[:LOOKED_AT])
    found: list[tuple[bool, int, str]] = []
    for delimiter in DELIMITERS:
        try:
            rows = [row for _, row in _parsed(head, delimiter, strict=False)]
        except csv.Error:
            continue
        # Within a quoted cell the head may end.
        widths = [len(row) for row in (rows[:-1] if len(rows) > 2 and len(head) < len(text) else rows)]
        if not widths or widths[0] < 2 or (delimiter == " " and set(widths) != {2}):
            continue
        known = any(_plain(cell) in NAMES["path"] + NAMES["label"] for cell in rows[0])
        found.append((known, sum(width == widths[0] for width in widths), delimiter))
    return max(found, key=lambda one: one[:2])[2] if found else ","


def _is_header(rows: list[list[str]], asked: dict[str, str]) -> bool:
    """Whether the first of *rows* has names rather than an image."""
    if any(_is_image(cell) for cell in rows[0]):
        return False
    if any(asked.get(what) in rows[0] for what in NAMES):
        return True
    if any(_plain(cell) in names for cell in rows[0] for names in NAMES.values()):
        return True
    return any(_is_image(cell) for row in rows[1:LOOKED_AT] for cell in row)


def _listed(
    file: Path, tabs: bool, split: Split, asked: dict[str, str], folders: _Folders, passed_over: PassedOver, notes: list[str],
    key: str,
) -> tuple[list[Listed], bool]:  # fmt: skip
    """The images that *file* lists for *split*, and whether a column of it says so."""
    header, rows = _table(file, tabs, asked, notes, key)
    if not rows:
        return [], False
    where = repr(str(file))
    names = header or [str(number + 1) for number in range(len(rows[0][1]))]
    path, label, divided = _columns(names, rows, asked, key, where)
    # A set or a subset may be something else.
    named = "split" in asked or (divided is not None and _plain(names[divided]) == "split")
    if divided is not None and not named and not any(split_name(row[divided]) for _, row in rows):
        divided = None
    flag = next((place for place, name in enumerate(names) if header and _plain(name) in FLAGS), None)
    if divided is None and flag is not None:
        divided, rows = flag, _of_flag(rows, flag, FLAGS[_plain(names[flag])], key, where)
    if divided is not None:
        rows = _of_split(rows, divided, split, key, where)
    elif header and (fold := next((name for name in names if _plain(name) in FOLDS), None)):
        notes.append(f"the column {fold!r} of {file.name} is not used: write train and val in one, and name it ?split=COLUMN")
    if not rows:
        return [], divided is not None
    bases = [asked["root"]] if "root" in asked else [str(file.parent), str(file.parent.parent), "."]
    bases = [os.path.abspath(os.path.expanduser(base)) for base in bases]
    base = next((base for base in bases if any(folders.find(base, row[path]) for _, row in rows[:LOOKED_AT])), bases[0])
    found = []
    for line, row in rows:
        if "\n" in row[path] + row[label]:
            raise UserError(f"{key}: a cell that ends on line {line} of {where} has several lines; close the quotes before it")
        full = folders.find(base, row[path])
        if full is not None:
            found.append(Listed(full, row[label], f"line {line} of {where}"))
        else:
            passed_over.add("without a file", f"{row[path]} (line {line} of {file.name})")
    if not found:
        cell = rows[0][1][path]
        fix = "download them" if "://" in cell else f"paths are relative to {base!r}: name another folder as ?root=FOLDER"
        raise UserError(f"{key}: none of the {len(rows):,} images that {where} lists is a file, as {cell!r}; {fix}")
    if base != bases[0]:
        notes.append(f"paths in {file.name} are relative to {base!r}")
    return found, divided is not None


def _columns(names: list[str], rows: list[Row], asked: dict[str, str], key: str, where: str) -> tuple[int, int, int | None]:
    """The places of the columns with the path, the label and, if there is one, the split."""
    shown = [repr(name) for name in names]
    if "," in asked.get("label", "") and asked["label"] not in names:
        raise other_task("labels", asked["label"], key=key, where=where)
    for what in NAMES:
        if what in asked and names.count(asked[what]) != 1:
            hint = nearest(asked[what], names) or f"; correct ?{what}={asked[what]}"
            raise UserError(f"{key}: {where} has no column {asked[what]!r} but {', '.join(shown)}{hint}")
    plain = [_plain(name) for name in names]
    seen = [row for _, row in rows[:LOOKED_AT]]
    images = [place for place in range(len(names)) if 2 * sum(_is_image(row[place]) for row in seen) > len(seen)]
    known = {what: [place for place, name in enumerate(plain) if name in NAMES[what]] for what in NAMES}

    def chosen(what: str, *choices: Sequence[int]) -> int:
        if what in asked:
            return names.index(asked[what])
        fits: Sequence[int] = next((fits for fits in choices if fits), [])
        the_only([repr(names[place]) for place in fits], what, shown, f"{key}: {where} has", f"add ?{what}=COLUMN")
        return fits[0]

    named = [place for place in images if place in known["path"]]
    path = chosen("path", [place for place in named if plain[place] == "path"], named, images, known["path"])
    divided = names.index(asked["split"]) if "split" in asked else next(iter(known["split"]), None)
    # A column without a name is the index that pandas writes.
    unused = ("", "unnamed:_0", *FLAGS, *FOLDS)
    others = [place for place in range(len(names)) if place not in (path, divided) and plain[place] not in unused]
    labels = [place for place in known["label"] if place in others]
    if "label" not in asked and not labels and len(others) > 1:
        if all(row[place] in ("0", "1", "0.0", "1.0") for row in seen for place in others):
            raise other_task("labels", ", ".join(names[place] for place in others[:5]), key=key, where=where)
        others = []
    exact = [place for place in labels if plain[place] == "label"]
    return path, chosen("label", exact, labels, others), divided


def _of_split(rows: list[Row], column: int, split: Split, key: str, where: str) -> list[Row]:
    """The rows whose cell in *column* names *split*."""
    roles = {cell: split_name(cell) for cell in {row[column] for _, row in rows}}
    unknown = sorted(cell for cell, role in roles.items() if role is None or role.rest)
    if unknown:
        raise UserError(f"{key}: {where} has {unknown[0]!r} in its column for the split; use train, val or test, or rename it")
    found = {cell: role.role for cell, role in roles.items() if role is not None}
    wanted = "train" if split == "train" else "val" if "val" in found.values() else "test"
    return [(line, row) for line, row in rows if found[row[column]] == wanted]


def _of_flag(rows: list[Row], column: int, meaning: tuple[str, str], key: str, where: str) -> list[Row]:
    """*rows* with the name of a split in the place of the truth value in *column*."""
    found = []
    for line, row in rows:
        if (place := TRUTH.get(row[column].casefold())) is None:
            raise UserError(f"{key}: line {line} of {where} has {row[column]!r} in a column of true and false; correct it")
        found.append((line, [*row[:column], meaning[place], *row[column + 1 :]]))
    return found


def _values(cells: list[str]) -> list[str | float | None]:
    """What *cells* mean: numbers where all are and one has a fraction, as pandas writes whole numbers beside missing ones."""
    given = [None if cell.casefold() in MISSING else cell for cell in cells]
    different = {cell for cell in given if cell is not None}
    if all(DECIMAL_COMMA.fullmatch(cell) for cell in different) and any("," in cell for cell in different):
        return [None if cell is None else float(cell.replace(",", ".")) for cell in given]
    if all(NUMBER.fullmatch(cell) for cell in different) and any(not cell.lstrip("+-").isdigit() for cell in different):
        return [None if cell is None else float(cell) for cell in given]
    return list(given)


class _Folders:
    """Which files there are; each folder is listed once, which for many files is faster than to ask for each of them."""

    def __init__(self) -> None:
        self._files: dict[str, set[str]] = {}
        self.linked = False
        """Whether a link was met, so that a file may be elsewhere, or listed by two names."""

    def find(self, base: str, name: str) -> str | None:
        """The absolute path of the file *name*, which is relative to *base*, also if another system wrote it."""
        slashed = name.replace("\\", "/")
        # macOS composes accents otherwise.
        for spelled in dict.fromkeys((name, slashed, normalize("NFC", slashed), normalize("NFD", slashed))):
            path = os.path.normpath(os.path.join(base, os.path.expanduser(spelled)))
            folder, file = os.path.split(path)
            if folder not in self._files:
                self._files[folder] = self._listed(folder)
            if file in self._files[folder]:
                return path
        return None

    def _listed(self, folder: str) -> set[str]:
        try:
            entries = [entry for entry in os.scandir(folder) if entry.is_file()]
            self.linked |= os.path.realpath(folder) != folder or any(entry.is_symlink() for entry in entries)
            return {entry.name for entry in entries}
        except (OSError, ValueError):
            return set()


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip("# ").casefold())


def _is_image(cell: str) -> bool:
    return cell.lower().endswith(EXTENSIONS)
