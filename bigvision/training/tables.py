"""Predictions as a file: a table in CSV, JSON, JSON lines or Parquet, and masks as PNG."""

from __future__ import annotations

import csv
import json
import os
import secrets
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from bigvision.disk import publish
from bigvision.errors import UserError, how_to_install

Row = dict[str, Any]
ENDINGS = (".csv", ".json", ".jsonl", ".parquet")
TABLE = "predictions.csv"
"""Beside the masks in a folder."""


class Table(ABC):
    """Rows that are written as they come, to a temporary file that takes its name when all are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")

    @abstractmethod
    def write(self, rows: list[Row]) -> None:
        """Write *rows*, which all have the same columns."""

    @abstractmethod
    def end(self) -> None:
        """Write what comes after the last row, and close the file."""

    def finish(self) -> None:
        """Give the file its name; another of this name is replaced."""
        self.end()
        publish(self.unfinished, self.path)

    def discard(self) -> None:
        with suppress(OSError):
            self.unfinished.unlink()


class Text(Table):
    """A text file, open for writing."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.file: IO[str] = self.unfinished.open("w", encoding="utf-8", newline="")
        self.rows = 0

    def end(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class Csv(Text):
    """Comma-separated values (RFC 4180, with line feeds): names with commas, quotes and line breaks are quoted."""

    def write(self, rows: list[Row]) -> None:
        writer = csv.writer(self.file, lineterminator="\n")
        if not self.rows and rows:
            writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
        self.rows += len(rows)


class JsonLines(Text):
    def write(self, rows: list[Row]) -> None:
        self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Json(Text):
    """A list of objects."""

    def write(self, rows: list[Row]) -> None:
        for row in rows:
            self.file.write(("[\n" if not self.rows else ",\n") + json.dumps(row, ensure_ascii=False))
            self.rows += 1

    def end(self) -> None:
        self.file.write("\n]\n" if self.rows else "[]\n")
        super().end()


class Parquet(Table):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"--out: {path} needs pyarrow; {how_to_install('parquet')}") from error
        self.arrow, self.writer = pyarrow, None

    def write(self, rows: list[Row]) -> None:
        if not rows:
            return
        if self.writer is None:
            # A column whose first values are all empty is of numbers, but for the reasons.
            kinds = {name: self._kind([row[name] for row in rows], name) for name in rows[0]}
            self.schema = self.arrow.schema(list(kinds.items()))
            self.writer = self.arrow.parquet.ParquetWriter(self.unfinished, self.schema)
        self.writer.write_table(self.arrow.Table.from_pylist(rows, schema=self.schema))

    def _kind(self, values: list[Any], name: str) -> Any:
        known = [value for value in values if value is not None]
        texts = any(isinstance(value, str) for value in known) or (not known and name in ("prediction", "error"))
        return self.arrow.string() if texts else self.arrow.float64()

    def end(self) -> None:
        if self.writer is None:
            empty = self.arrow.schema([("sample", self.arrow.string()), ("prediction", self.arrow.string())])
            self.writer = self.arrow.parquet.ParquetWriter(self.unfinished, empty)
        self.writer.close()


FORMATS: dict[str, type[Table]] = {".csv": Csv, ".json": Json, ".jsonl": JsonLines, ".parquet": Parquet}


def open_table(path: Path) -> Table:
    """The table at *path*, of the format that its ending says. Raises `UserError` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return FORMATS[path.suffix.lower()](path)
    except OSError as error:
        raise UserError(f"--out: {str(path)!r} cannot be written: {error.strerror}; name another file") from error


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Write *pixels*, (H, W, 3) of 8 bits or (H, W) of 8 or 16, as a PNG file, in the place of one that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    Image.fromarray(pixels).save(unfinished, format="PNG")
    os.replace(unfinished, path)
