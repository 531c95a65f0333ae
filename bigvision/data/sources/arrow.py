"""Parquet files, and what Hugging Face's ``save_to_disk`` writes: images and labels in the columns of Arrow tables."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import numpy as np
import torch

from bigvision.data.labels import Coded, Labels, Target, by_name, by_place, check_all_labelled, joined, label_by, other_task
from bigvision.data.sources.base import Column, Opening, Packed, Sample, Source, Subset, UnreadableSample, stamp
from bigvision.data.splits import choose_files, named_parts, part, part_for, xxh3_hashes
from bigvision.data.targets import Found, Several, find_indicators, find_numbers, find_sets, parted
from bigvision.data.workers import each
from bigvision.errors import UserError, how_to_install, nearest, one_line

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABELS = ("label", "cls", "class", "target", "category", "labels", "class_id", "label_id", "fine_label", "coarse_label")
ASKED = ("image", "label")
"""What may be named after a path's question mark, for any task."""
SEVERAL = ("labels", "separator")
"""What else, for several labels or numbers: their columns, or what parts the labels in a text."""
CACHE = 256 << 20
"""Bytes of decoded row groups that each process keeps."""


# Columns


class Columns(NamedTuple):
    image: str
    label: str


def parse_asked(argument: str, key: str, known: Sequence[str] = ASKED) -> tuple[str, dict[str, str]]:
    """Part ``PATH?image=img&label=fine_label`` into the path and what is named after it. Raises `UserError`."""
    # A question mark may also be a part of the path's pattern.
    match = re.fullmatch(r"(.*)\?([A-Za-z_]+=[^?]*)", argument, re.DOTALL)
    if not match or ("root" not in known and "/" in match[2]):
        return argument, {}
    found: dict[str, str] = {}
    for name, column in parse_qsl(match[2], keep_blank_values=True):
        if name not in known:
            hint = nearest(name, known) or f"; known are {', '.join(known[:-1])} and {known[-1]}"
            raise UserError(f"{key}: unknown {name!r} in ?{match[2]}{hint}")
        if name in found or not column:
            raise UserError(f"{key}: {name} in ?{match[2]} must be the name of one column")
        found[name] = column
    return match[1], found


def find_columns(schema: Any, asked: dict[str, str], key: str, where: str) -> Columns:
    """Return those that are *asked* for, or else those that are :func:`fitting`. Raises `UserError`.

    Of several columns (``labels=a,b``) the label is the first.
    """
    several = [name.strip() for name in asked.get("labels", "").split(",") if name.strip()]
    if several:
        if missing := next((name for name in several if schema.names.count(name) != 1), None):
            raise UserError(f"{key}: {where} has no column {missing!r} but {', '.join(schema.names)}; correct ?labels=")
        asked = asked | {"label": several[0]}
    asked = {what: name for what, name in asked.items() if what in ASKED}
    types = {name: feature.get("_type") for name, feature in _features(schema).items() if isinstance(feature, dict)}
    for what, name in asked.items():
        if name not in schema.names:
            raise UserError(f"{key}: {where} has no column {name!r} but {', '.join(schema.names)}; correct ?{what}={name}")
    found = Columns(*(
        asked.get(what) or the_only(fitting(what, schema.names, types), what, schema.names, f"{key}: {where} has",
                                    f"add ?{what}=NAME to the path")
        for what in ASKED
    ))  # fmt: skip
    for name in found:
        if schema.names.count(name) > 1:
            raise UserError(f"{key}: {where} has {schema.names.count(name)} columns {name!r}; rename all but one")
    return found


def fitting(what: str, names: Sequence[str], types: Mapping[str, str | None]) -> list[str]:
    """The columns among *names* that may have *what* (image or label): the one of this name, else those of Hugging Face's
    types ``Image`` and ``ClassLabel``, else those with well-known names, in any case."""
    if what in names:
        return [what]
    kind, known = ("Image", IMAGES) if what == "image" else ("ClassLabel", LABELS)
    return [name for name in names if types.get(name) == kind] or [name for name in names if name.casefold() in known]


def the_only(fits: Sequence[str], what: str, names: Sequence[str], begin: str, fix: str) -> str:
    """The only one of *fits*, which are those of the columns *names* that may have *what*. Raises `UserError`."""
    if len(fits) != 1:
        which = f"{' or '.join(fits)} may be" if fits else "none is known as"
        raise UserError(f"{begin} the columns {', '.join(names)}, of which {which} the {what}; {fix}")
    return fits[0]


def class_names(schema: Any, label: str) -> list[str] | None:
    """The names of Hugging Face's ``ClassLabel``."""
    feature = _features(schema).get(label)
    if isinstance(feature, dict) and isinstance(feature.get("feature"), dict):  # of a list
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) else None
    return names if isinstance(names, list) and names and all(isinstance(name, str) for name in names) else None


def arrow_labels(column: Any, *, key: str, where: str) -> Coded:
    """The labels of an Arrow column of any type, checked to be one for each row of the file *where*. Raises `UserError`."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_struct(column.type) or pa.types.is_map(column.type):
        raise UserError(f"{key}: {where}: its labels are {column.type}; they must be whole numbers or names")
    if pa.types.is_nested(column.type):
        raise other_task("labels", str(column.type), key=key, where=where)
    encoded = column.combine_chunks().dictionary_encode()
    distinct = encoded.dictionary.to_pylist()
    codes = encoded.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False).astype(np.int64)
    found = Coded([*distinct, None], codes)
    check_all_labelled(found, where, lambda row: f"row {row} of {where}", key)
    return Coded(distinct, codes)


def arrow_targets(
    table: Sequence[Any], names: Sequence[str], several: bool, separator: str | None, *, key: str, where: str
) -> Any:
    """Several labels of each row, as `Several`, or numbers, float64 (rows, columns), of the columns *table*, called *names*."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute  # its functions are made when it is imported

    column = table[0].combine_chunks()
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    if is_list and several:
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        inner = (
            arrow_labels(pa.chunked_array([column.flatten()]), key=key, where=where)
            if lengths.any()
            else Coded([], lengths[:0])
        )
        return Several(inner, lengths)
    if several and len(table) == 1 and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        labels, _ = parted([text or "" for text in column.to_pylist()], separator)
        return Several.of(labels)
    try:
        if is_list:
            rows = column.to_pylist()
            if len({len(row or ()) for row in rows}) != 1:
                raise UserError(
                    f"{key}: {where}: {names[0]!r} has lists of different lengths; numbers are as many for each row"
                )
            return np.array(rows, dtype=np.float64)
        columns = [pc.cast(one.combine_chunks(), pa.float64()).to_numpy(zero_copy_only=False) for one in table]
    except (pa.ArrowException, ValueError, TypeError) as error:
        kinds = ", ".join(f"{name!r} of {one.type}" for name, one in zip(names, table))
        what = "several labels need a column of lists, of texts, or several of 0 and 1" if several else "numbers are needed"
        raise UserError(
            f"{key}: {where} has {kinds}; {what}, as ?labels=COLUMN,COLUMN names them ({one_line(error)[:80]})"
        ) from error
    if several and len(columns) == 1:
        return Several(arrow_labels(table[0], key=key, where=where), np.ones(len(columns[0]), dtype=np.int64))
    return np.stack(columns, axis=1)


def _features(schema: Any) -> dict[str, Any]:
    """Hugging Face's, which its library writes into the schema."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# Files


class RowFile(NamedTuple):
    """What is needed of each file of rows from the start."""

    path: Path
    stamp: tuple[int, int]
    columns: Columns
    classes: list[str] | None
    """the names of Hugging Face's ``ClassLabel``"""
    chunks: list[int]
    """rows of each"""
    names: list[str]
    """of the columns with the targets"""
    labels: Any
    """a `Coded`; for other tasks what `arrow_targets` returns"""


class Parquet:
    """A Parquet file; its chunks are row groups."""

    kind = "Parquet"
    most = 64
    """Files that each process keeps open."""

    def __init__(self, path: str) -> None:
        import pyarrow.parquet

        self.file = pyarrow.parquet.ParquetFile(path)
        self.schema = self.file.schema_arrow

    def chunks(self) -> list[int]:
        return [self.file.metadata.row_group(group).num_rows for group in range(self.file.metadata.num_row_groups)]

    def column(self, name: str) -> Any:
        return self.file.read(columns=[name]).column(0)

    def chunk(self, name: str, number: int) -> Any:
        # Workers are many already: a thread pool in each only gets in their way.
        return self.file.read_row_group(number, columns=[name], use_threads=False).column(0)

    def close(self) -> None:
        self.file.close(force=True)


class ArrowStream:
    """A file in Arrow's stream format; its chunks are record batches. Memory of it is mapped: the system shares the pages."""

    kind = "Arrow"
    most = 1 << 20

    def __init__(self, path: str) -> None:
        import pyarrow as pa

        with pa.memory_map(path) as mapped:
            self.table = pa.ipc.open_stream(mapped).read_all()
        self.schema = self.table.schema

    def chunks(self) -> list[int]:
        return [len(chunk) for chunk in self.table.column(0).chunks]

    def column(self, name: str) -> Any:
        return self.table.column(name)

    def chunk(self, name: str, number: int) -> Any:
        return self.table.column(name).chunk(number)

    def close(self) -> None:
        """Its file is closed already."""


Format = type[Parquet] | type[ArrowStream]


class Rows(Packed):
    """The rows of files in the order given.

    A chunk is read as a whole, and the last ones are kept: up to `CACHE` bytes, at least one. So an order that jumps about
    reads a row group for each image; ``data.shuffle_block`` near the rows of a group keeps reads near each other.
    """

    def __init__(self, name: str, form: Format, files: Sequence[RowFile], labels: Labels | Found) -> None:
        super().__init__([file.path for file in files], [file.stamp for file in files], form.most, form, form.close)
        self.name, self.classes, self.notes, self.column = name, labels.classes, labels.notes, files[0].columns.image
        chunks = [(number, chunk, rows) for number, file in enumerate(files) for chunk, rows in enumerate(file.chunks)]
        self._chunks = torch.tensor([(number, chunk) for number, chunk, _ in chunks])
        # The first row of each chunk, and then how many rows there are in all.
        self._begins = torch.tensor([0, *accumulate(rows for _, _, rows in chunks)])
        self._firsts = [0, *accumulate(sum(file.chunks) for file in files)]
        self._labels = Column(torch.from_numpy(labels.values)) if isinstance(labels, Labels) else labels.column
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def where(self, index: int) -> str:
        number = int(self._chunks[self._chunk(index), 0])
        return f"{self.files[number]}: row {index - self._firsts[number]}"

    def key(self, index: int) -> bytes:
        number = int(self._chunks[self._chunk(index), 0])
        return os.fsencode(f"{os.path.basename(self.files[number])}/{index - self._firsts[number]}")

    def read(self, index: int) -> Sample:
        chunk = self._chunk(index)
        content = self._column(chunk)[index - int(self._begins[chunk])].as_py()
        if isinstance(content, dict):
            if content.get("bytes") is None and content.get("path"):
                return Sample(_beside(self.files[int(self._chunks[chunk, 0])], content["path"]), self._labels[index])
            content = content.get("bytes")
        if content is None:
            raise UnreadableSample("the row has no image")
        return Sample(content, self._labels[index])

    def _chunk(self, row: int) -> int:
        return int(torch.searchsorted(self._begins, row, right=True)) - 1

    def _column(self, chunk: int) -> Any:
        """The images of a chunk, read or kept from before."""
        if chunk in self._kept:
            self._kept.move_to_end(chunk)
            return self._kept[chunk]
        import pyarrow as pa

        number, within = self._chunks[chunk].tolist()
        try:
            column = self.opened(number).chunk(self.column, within)
        except OSError as error:
            raise UnreadableSample(one_line(error)) from error
        except (pa.ArrowException, IndexError) as error:
            raise UnreadableSample(f"row group {within} cannot be read: {one_line(error)}") from error
        if len(column) != int(self._begins[chunk + 1] - self._begins[chunk]):
            raise UnreadableSample(f"row group {within} is cut short")
        self._kept[chunk] = column
        while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > CACHE:
            self._kept.popitem(last=False)
        return column

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_kept": OrderedDict()}


def _beside(file: str, path: str) -> bytes:
    """The image at *path*, which is relative to the folder of *file* and may not leave it."""
    folder = os.path.realpath(os.path.dirname(file))
    try:
        found = os.path.realpath(os.path.join(folder, path))
        if os.path.commonpath([folder, found]) != folder or not os.path.isfile(found):
            raise UnreadableSample(f"the row has no bytes, and its path {path!r} is no file in the folder of its data file")
        with open(found, "rb") as image:
            return image.read()
    except (OSError, ValueError) as error:
        raise UnreadableSample(f"the row has no bytes, and its path {path!r} cannot be read: {one_line(error)}") from error


# Opening


def open_parquet(argument: str, opening: Opening) -> Source:
    """Open Parquet files (see :func:`~bigvision.data.splits.choose_files`).

    One column has encoded images, as binary or in a struct's ``bytes``, and one labels, whole numbers, truth values or texts:
    those that ``?image=NAME&label=NAME`` at the end of *argument* names, or that :func:`find_columns` finds. Several labels are
    lists, a text whose labels are parted by ``&separator=``, or columns of 0 and 1 (``?labels=NAME,NAME``), and so are numbers.
    The classes' names are those of the Hugging Face ``ClassLabel``, where there is one. Held out is by the names of files and
    rows.
    """
    _check_installed("parquet", opening.key)
    path, asked = _asked(argument, opening)
    chosen = choose_files(path, ".parquet", opening)
    source = _open_rows(Parquet, f"parquet:{path}", chosen.files, asked, chosen.folders, chosen.hold_out, opening)
    source.passed_over = chosen.passed_over
    return source


def open_saved(argument: str, opening: Opening) -> Source:
    """Open the folder that ``save_to_disk`` of a ``Dataset`` or ``DatasetDict`` has written: all else as `open_parquet`."""
    _check_installed("hf", opening.key)
    path, asked = _asked(argument, opening)
    folder, hold_out = _saved_folder(Path(path).expanduser(), path, opening)
    state = _json(folder / "state.json", opening.key)
    names = [str(file.get("filename")) for file in state.get("_data_files") or [] if isinstance(file, dict)]
    if state.get("_indices_data_files") or any(os.path.basename(name) != name for name in names):
        raise UserError(f"{opening.key}: {str(folder / 'state.json')!r} is of another version; save the dataset again")
    files = [folder / name for name in names]
    source = _open_rows(ArrowStream, f"hf:{path}", files, asked, [folder, folder.parent], hold_out, opening)
    source.location = str(folder)
    return source


def _asked(argument: str, opening: Opening) -> tuple[str, dict[str, str]]:
    """The path in *argument*, and the columns that are named after it."""
    return parse_asked(argument, opening.key, ASKED if opening.target == "label" else (*ASKED, *SEVERAL))


def _check_installed(name: str, key: str) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(f"{key}: {name} needs pyarrow; {how_to_install('parquet')}") from error


def _open_rows(
    form: Format, name: str, paths: Sequence[Path], asked: dict[str, str], folders: Sequence[Path], hold_out: bool,
    opening: Opening,
) -> Source:  # fmt: skip
    """The rows of *paths*, or the split's part of them; *folders* may have a file with the classes."""
    key, where = opening.key, repr(name.partition(":")[2])
    read = each(
        lambda path: _row_file(form, path, asked, opening.target, key),
        paths,
        f"{key}: {form.kind} files read",
        report=opening.first,
    )
    files = [file for file in read if sum(file.chunks)]
    if not files:
        raise UserError(f"{key}: the files of {where} have no rows; write them again")
    other = next((file for file in files if (file.columns, file.names) != (files[0].columns, files[0].names)), None)
    if other is not None:
        raise UserError(
            f"{key}: {str(other.path)!r} has its images and labels in {' and '.join(other.columns)}, {str(files[0].path)!r} in "
            f"{' and '.join(files[0].columns)}; open one of them"
        )
    other = next((file for file in files if file.classes != files[0].classes), None)
    if other is not None:
        raise UserError(f"{key}: {str(other.path)!r} names other classes than {str(files[0].path)!r}; open one of them")
    target_rows = _label_rows if opening.target == "label" else _target_rows
    labels = target_rows(files, opening, folders, where)
    source = Rows(name, form, files, labels)
    if not hold_out:
        return source
    strata = labels.values if isinstance(labels, Labels) else np.zeros(len(source), dtype=np.int64)
    rows = (os.fsencode(f"{file.path.name}/{row}") for file in files for row in range(sum(file.chunks)))
    otherwise = f"{key}: {where} has one image per class, none can be held out; add images or val files"
    return Subset(source, part(xxh3_hashes(rows), strata, opening.split, otherwise))


def _row_file(form: Format, path: Path, asked: dict[str, str], target: Target, key: str) -> RowFile:
    """Raises `UserError`: it is damaged, or lacks a column of the right type."""
    import pyarrow as pa

    where = repr(str(path))
    try:
        now = stamp(path.stat())
        with closing(form(str(path))) as file:
            columns = find_columns(file.schema, asked, key, where)
            kind = file.schema.field(columns.image).type
            content = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
            if not (pa.types.is_binary(content) or pa.types.is_large_binary(content) or pa.types.is_binary_view(content)):
                raise UserError(f"{key}: {where}: its images are {kind}; encode them, as binary or in a struct's 'bytes'")
            names = [name.strip() for name in asked.get("labels", columns.label).split(",")]
            if target == "label":
                labels = arrow_labels(file.column(columns.label), key=key, where=where)
            else:
                table = [file.column(name) for name in names]
                labels = arrow_targets(table, names, target == "labels", asked.get("separator"), key=key, where=where)
            classes = class_names(file.schema, columns.label) if target != "numbers" else None
            return RowFile(path, now, columns, classes, file.chunks(), names, labels)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{key}: {where} cannot be read: {one_line(error)}; copy or write it again") from error


def _target_rows(files: Sequence[RowFile], opening: Opening, folders: Sequence[Path], where: str) -> Found:
    """Several labels of each row, or its numbers."""
    key, known, names = opening.key, opening.classes, files[0].names
    if isinstance(files[0].labels, Several):
        several = Several.join([file.labels for file in files])
        if files[0].classes is not None and all(type(value) is int for value in several.column.distinct):
            # Numbers are places in the list of names.
            places = by_place(several.column.distinct, files[0].classes, key=key, where=where).tolist()
            several.column = Coded([files[0].classes[place] for place in places], several.column.codes)
            known = files[0].classes if known is None else known
        return find_sets(several, known, folders, key=key, where=where)

    def at(row: int) -> str:
        for file in files:
            if row < sum(file.chunks):
                return f"row {row} of {str(file.path)!r}"
            row -= sum(file.chunks)
        return where

    values = np.concatenate([file.labels for file in files])
    if values.shape[1] != len(names):  # lists of numbers
        names = list(known or map(str, range(values.shape[1])))
    find = find_indicators if opening.target == "labels" else find_numbers
    return find(values, names, known, key=key, where=where, at=at)


def _label_rows(files: Sequence[RowFile], opening: Opening, folders: Sequence[Path], where: str) -> Labels:
    """The label of each row: by the classes that are known, or else by the files' own, by name where the files name theirs."""
    first, key, classes = files[0], opening.key, opening.classes
    column = joined([file.labels for file in files])
    if first.classes is None:
        found = label_by(column.distinct, classes, folders, key=key, where=where)
        return Labels(found.classes, found.values[column.codes], found.notes)
    # Numbers are places in the list of names, also where the names are numbers.
    place = by_place if all(type(value) is int for value in column.distinct) else by_name
    values = place(column.distinct, first.classes, key=key, where=where)[column.codes]
    if classes is None or first.classes == list(classes):
        return Labels(first.classes, values)
    # By their names they agree with the training data's, whose order may be another.
    if len(set(first.classes)) < len(first.classes):
        raise UserError(f"{key}: {where} names a class twice, and not the same classes as the training data; use its own")
    present = np.unique(values)
    places = np.zeros(len(first.classes), dtype=np.int64)
    places[present] = by_name([first.classes[value] for value in present], classes, key=key, where=where)
    return Labels(list(classes), places[values])


def _saved_folder(folder: Path, argument: str, opening: Opening) -> tuple[Path, bool]:
    """The folder of a ``Dataset``, and whether to hold out a part of it."""
    if not folder.is_dir():
        raise UserError(
            f"{opening.key}: no folder {argument!r}; hf:PATH reads what Dataset.save_to_disk(PATH) wrote. For a dataset of the "
            "Hub, download its Parquet files and name them as parquet:PATH"
        )
    if (folder / "state.json").is_file():
        return folder, opening.shared
    if not (folder / "dataset_dict.json").is_file():
        kind = next((kind for kind in ("parquet", "csv", "tsv") if any(folder.rglob(f"*.{kind}"))), None)
        hint = f"did you mean {kind}:{argument}?" if kind else "give the folder of Dataset.save_to_disk"
        raise UserError(f"{opening.key}: {argument!r} has no state.json or dataset_dict.json; {hint}")
    splits = _json(folder / "dataset_dict.json", opening.key).get("splits")
    names = [name for name in splits if isinstance(name, str) and (folder / name / "state.json").is_file()] if splits else []
    train, val = named_parts(names, key=opening.key, where=repr(argument))
    has = f"{argument!r} has {', '.join(names) or 'no splits'}"
    name, hold_out = part_for(opening, train, val, has=has, fix=f"name one as hf:{argument}/NAME")
    return folder / name, hold_out


def _json(file: Path, key: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
        if isinstance(found, dict):
            return found
        raise ValueError("it is no object")
    except OSError as error:
        raise UserError(f"{key}: {str(file)!r} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{key}: {str(file)!r} is damaged: {one_line(error)}; save the dataset again") from error
