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
from bigvision.data.labels import BYTE_ORDER_MARKS, Labels, coded, decoded, label_samples, other_task
from bigvision.data.sources.arrow import LABELS, SEVERAL, parse_asked, the_only
from bigvision.data.sources.base import Opening, PassedOver, Split
from bigvision.data.sources.folder import ImageFolder
from bigvision.data.splits import choose_files, part, split_name, xxh3_hashes
from bigvision.data.targets import Found, Several, as_numbers, find_indicators, find_numbers, find_sets, parted
from bigvision.errors import UserError, nearest, one_line

ASKED = ("path", "label", *SEVERAL, "split", "root")
"""What may be named after a path's question mark: columns, what parts the labels in one, and the folder that relative paths
start from."""
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
    cells: tuple[str, ...]
    """with the target: one, or that of each column"""
    at: str
    """what messages call the row"""


def open_table(name: str, argument: str, opening: Opening) -> ImageFolder:
    """Open the files *argument* (see :func:`~bigvision.data.splits.choose_files`), which list images.

    A row has the path of an image and its label; columns are named in a header, or found by what they hold, or asked for:
    ``PATH?path=COLUMN&label=COLUMN``, a number where there is no header. Several labels are in one column
    (``?label=tags&separator=|``), in a column of 0 and 1 for each class (``?labels=cat,dog``), or in several rows of an image;
    numbers in one or several columns. Where a column says which split a row is in, rows of the other splits are left out. What
    is held out is so by a hash of the path. *name* is "csv", or "tsv" for files whose columns are separated by tabs alone.
    """
    key, split = opening.key, opening.split
    path, asked = parse_asked(argument, key, ASKED)
    if opening.target == "label" and "," not in asked.get("labels", ","):
        parse_asked(argument, key, [name for name in ASKED if name not in SEVERAL])  # a typo of label
    chosen = choose_files(path, f".{name}", opening)
    rows: list[Listed] = []
    columns: list[str] | None = None
    folders = _Folders()
    passed_over, divided, notes = PassedOver(), False, list[str]()
    for file in chosen.files:
        found, names, has_split = _listed(file, name == "tsv", opening, asked, folders, passed_over, notes)
        if found and columns not in (None, names) and len(names) > 1:
            raise UserError(f"{key}: {str(file)!r} has its targets in {', '.join(names)}, not in {', '.join(columns or ())}")
        columns = names if found else columns
        rows, divided = rows + found, divided or has_split
    if not rows or columns is None:
        raise UserError(f"{key}: the files of {argument!r} list no images for {split}; add rows")
    where = repr(argument)
    if opening.target == "label":
        labels = _one_label(rows, opening, chosen.folders, where)
        classes, targets, strata, more = labels.classes, None, labels.values, labels.notes
    else:
        rows, (classes, targets, more) = _targets(rows, columns, asked, opening, chosen.folders, where)
        strata = np.zeros(len(rows), dtype=np.int64)
    if again := len(rows) - len({row.path for row in rows}):
        notes.append(f"{again:,} rows list an image again; it counts as often as it is listed")
    root = os.path.commonpath([os.path.dirname(row.path) for row in rows])
    names = [row.path[len(root) :].lstrip(os.sep) for row in rows]
    places, hold_out = np.arange(len(rows)), chosen.hold_out and not divided
    if hold_out:
        # An image that is listed twice is in one part.
        numbers: dict[str, int] = {}
        which = np.array([numbers.setdefault(path, len(numbers)) for path in names])
        _, firsts = np.unique(which, return_index=True)
        otherwise = f"{key}: {where} has one image per class, none can be held out; add images or a val file"
        places = part(xxh3_hashes(map(os.fsencode, numbers)), strata[firsts], split, otherwise)
        places = np.flatnonzero(np.isin(which, places))
    files = [(names[place], int(strata[place])) for place in places]
    if targets is not None:
        targets = targets.of(places)
    source = ImageFolder(f"{name}:{argument}", root, classes, files, targets)
    source.passed_over, source.linked = passed_over, folders.linked
    source.divided = hold_out and not folders.linked
    if odd := next((one for one in classes if one.casefold() in ("na", "none") and opening.classes is None), None):
        notes.append(f"the label {odd!r} is taken as a class of that name: empty the cell of a row that has no label")
    source.notes = (*notes, *more)
    return source


def _one_label(rows: Sequence[Listed], opening: Opening, folders: Sequence[Path], where: str) -> Labels:
    """The label of each row."""
    label_of: dict[str, str] = {}
    for row in rows:
        if (other := label_of.setdefault(row.path, row.cells[0])) != row.cells[0]:
            raise other_task("labels", f"{other} and {row.cells[0]}, of {row.path!r}", key=opening.key, where=row.at)
    column = coded(_values([row.cells[0] for row in rows]))
    return label_samples(column, opening.classes, folders, key=opening.key, where=where, at=lambda row: rows[row].at)


def _targets(
    rows: list[Listed], columns: list[str], asked: dict[str, str], opening: Opening, folders: Sequence[Path], where: str
) -> tuple[list[Listed], Found]:
    """The samples and their targets: several labels, or numbers."""
    key, known = opening.key, opening.classes

    def at(row: int) -> str:
        return rows[row].at

    if opening.target == "labels" and (len(columns) == 1 and "labels" not in asked):
        texts = ["" if row.cells[0].casefold() in MISSING else row.cells[0] for row in rows]
        several, separator = parted(texts, asked.get("separator"))
        # Rows of one image are one sample.
        merged: dict[str, list[str]] = {}
        for row, labels in zip(rows, several):
            merged.setdefault(row.path, []).extend(labels)
        found = find_sets(Several.of(list(merged.values())), known, folders, key=key, where=where)
        if "separator" not in asked and any(len(labels) > 1 for labels in several):
            found = found._replace(notes=(f"labels are parted at {separator!r}; ?separator= names another", *found.notes))
        first = {row.path: row for row in reversed(rows)}
        return [first[path] for path in merged], found
    plain = list(zip(*(_values(list(cells)) for cells in zip(*(row.cells for row in rows)))))
    if opening.target == "labels":
        plain = [[_as_truth(cell) for cell in cells] for cells in plain]
    values = as_numbers(plain, columns, key=key, at=at)
    return rows, (find_indicators if opening.target == "labels" else find_numbers)(
        values, columns, known, key=key, where=where, at=at
    )  # fmt: skip


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
    file: Path, tabs: bool, opening: Opening, asked: dict[str, str], folders: _Folders, passed_over: PassedOver,
    notes: list[str],
) -> tuple[list[Listed], list[str], bool]:  # fmt: skip
    """The images that *file* lists for the split, the columns with their targets, and whether a column says which split."""
    key, split = opening.key, opening.split
    header, rows = _table(file, tabs, asked, notes, key)
    if not rows:
        return [], [], False
    where = repr(str(file))
    names = header or [str(number + 1) for number in range(len(rows[0][1]))]
    path, targets, divided = _columns(names, rows, asked, opening, where)
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
    columns = [names[place] for place in targets]
    if not rows:
        return [], columns, divided is not None
    bases = [asked["root"]] if "root" in asked else [str(file.parent), str(file.parent.parent), "."]
    bases = [os.path.abspath(os.path.expanduser(base)) for base in bases]
    base = next((base for base in bases if any(folders.find(base, row[path]) for _, row in rows[:LOOKED_AT])), bases[0])
    found = []
    for line, row in rows:
        cells = tuple(row[place] for place in targets)
        if "\n" in row[path] + "".join(cells):
            raise UserError(f"{key}: a cell that ends on line {line} of {where} has several lines; close the quotes before it")
        full = folders.find(base, row[path])
        if full is not None:
            found.append(Listed(full, cells, f"line {line} of {where}"))
        else:
            passed_over.add("without a file", f"{row[path]} (line {line} of {file.name})")
    if not found:
        cell = rows[0][1][path]
        fix = "download them" if "://" in cell else f"paths are relative to {base!r}: name another folder as ?root=FOLDER"
        raise UserError(f"{key}: none of the {len(rows):,} images that {where} lists is a file, as {cell!r}; {fix}")
    if base != bases[0]:
        notes.append(f"paths in {file.name} are relative to {base!r}")
    return found, columns, divided is not None


def _columns(
    names: list[str], rows: list[Row], asked: dict[str, str], opening: Opening, where: str
) -> tuple[int, list[int], int | None]:  # fmt: skip
    """The places of the column with the path, of those with the target and, if there is one, of that with the split."""
    key, target = opening.key, opening.target
    shown = [repr(name) for name in names]
    asked = dict(asked)
    if "," in asked.get("label", "") and asked["label"] not in names:
        asked["labels"] = asked.pop("label")
    several = [name.strip() for name in asked["labels"].split(",")] if "labels" in asked else []
    if target == "label" and (several or "separator" in asked):
        raise other_task("labels", ", ".join(several) or f"parted at {asked['separator']!r}", key=key, where=where)
    wanted = [(what, asked[what]) for what in NAMES if what in asked] + [("labels", name) for name in several]
    for what, name in wanted:
        if names.count(name) != 1:
            hint = nearest(name, names) or f"; correct ?{what}={asked[what]}"
            raise UserError(f"{key}: {where} has no column {name!r} but {', '.join(shown)}{hint}")
    plain = [_plain(name) for name in names]
    seen = [row for _, row in rows[:LOOKED_AT]]
    images = [place for place in range(len(names)) if 2 * sum(_is_image(row[place]) for row in seen) > len(seen)]
    known = {what: [place for place, name in enumerate(plain) if name in NAMES[what]] for what in NAMES}

    def chosen(what: str, *choices: Sequence[int]) -> int:
        if what in asked:
            return names.index(asked[what])
        fits: Sequence[int] = next((fits for fits in choices if fits), [])
        fix = f"add ?{what}=COLUMN{' or ?labels=COLUMN,COLUMN' if what == 'label' and target != 'label' else ''}"
        the_only([repr(names[place]) for place in fits], what, shown, f"{key}: {where} has", fix)
        return fits[0]

    named = [place for place in images if place in known["path"]]
    path = chosen("path", [place for place in named if plain[place] == "path"], named, images, known["path"])
    divided = names.index(asked["split"]) if "split" in asked else next(iter(known["split"]), None)
    if several:
        return path, [names.index(name) for name in several], divided
    # A column without a name is the index that pandas writes.
    unused = ("", "unnamed:_0", *FLAGS, *FOLDS)
    others = [place for place in range(len(names)) if place not in (path, divided) and plain[place] not in unused]
    labels = [place for place in known["label"] if place in others]
    if target == "labels":
        labels = [place for place in others if plain[place] in ("tags", "labels")] or labels
    if target == "numbers" and "x" in plain:
        labels = [place for place in labels if plain[place] != "y"]  # two numbers, not a label
    if "label" not in asked and not labels and len(others) > 1:
        cells = {row[place].casefold() for row in seen for place in others} - set(MISSING)
        if cells and all(cell in TRUTH and cell not in ("yes", "no") for cell in cells):
            if target == "labels":
                return path, others, divided
            if target == "label":
                raise other_task("labels", ", ".join(names[place] for place in others[:5]), key=key, where=where)
        if target == "numbers" and cells and all(NUMBER.fullmatch(cell) or DECIMAL_COMMA.fullmatch(cell) for cell in cells):
            return path, others, divided
        others = []
    exact = [place for place in labels if plain[place] == "label"]
    return path, [chosen("label", exact, labels, others)], divided


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


def _as_truth(cell: str | float | None) -> str | float | None:
    """1 for true and 0 for false, as spreadsheets write them."""
    place = TRUTH.get(cell.casefold()) if isinstance(cell, str) else None
    return cell if place is None else 1 - place


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
