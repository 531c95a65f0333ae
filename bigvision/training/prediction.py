"""Predictions of a model for images, in their order, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from bigvision.config import Config
from bigvision.data import Batch, Source, open_source
from bigvision.data.sources import DATASETS
from bigvision.data.sources.unlabelled import Unlabelled, open_images
from bigvision.errors import UserError, either
from bigvision.runtime import all_or_none, gather_json
from bigvision.samples import stack
from bigvision.tasks import Task
from bigvision.training.data import BadSamples, Data, Validation, open_on_all
from bigvision.training.evaluation import Ready
from bigvision.training.tables import ENDINGS, TABLE, Row, Table, open_table, write_image

TTA = ("none", "flip")


class Prediction(NamedTuple):
    """What is asked for."""

    source: Any
    """a name as in ``data.val``, the path of images, or a dataset"""
    out: Path | None = None
    """a table, whose ending says its format, or a folder for masks; None: rows are returned alone"""
    top: int = 1
    tta: str = "none"
    draw: Path | None = None
    """a folder for the images with what is predicted drawn on them"""

    @property
    def folder(self) -> bool:
        """Whether *out* is a folder."""
        return self.out is not None and self.out.suffix.lower() not in ENDINGS

    def check(self, task: Task) -> None:
        """Raise `UserError` for what cannot be done."""
        if self.top < 1:
            raise UserError(f"--top-k: {self.top} must be a whole number from 1 on")
        if self.tta not in TTA:
            raise UserError(f"--tta: {self.tta!r} is unknown: use {either(TTA)}")
        if type(task).predict is Task.predict:
            raise UserError(f"predict: {type(task).__name__} does not say what its predictions are")
        if self.draw is not None and type(task).draw is Task.draw:
            raise UserError(f"--draw: {type(task).__name__} has nothing to draw on an image: leave it out")
        if task.target == "mask" and not self.folder:
            raise UserError(f"--out: {str(self.out)!r}, but masks are predicted: name a folder for them")
        if task.target != "mask" and self.folder:
            raise UserError(f"--out: {str(self.out)!r} has none of the endings {', '.join(ENDINGS)}: name a file that has one")


def open_unlabelled(asked: Prediction, config: Config, task: Task, runtime: Any, classes: list[str]) -> Data:
    """Open what is to be predicted on every rank; *classes* are the model's."""

    def opened(first: bool) -> Source:
        spec = asked.source
        if isinstance(spec, (str, Path)) and str(spec).partition(":")[0] not in DATASETS:
            return Unlabelled(open_images(str(spec), "predict"), classes)
        named = open_source(
            str(spec) if isinstance(spec, Path) else spec, "val", key="predict", root=config.data.root, first=first,
            shared=False, target=task.target, ignore=config.task.ignore,
        )  # fmt: skip
        return Unlabelled(named, classes)

    source = open_on_all(opened, runtime)
    return Data(source, source, BadSamples(float(len(source) + 1), {"train": 0, "val": len(source)}), _WithoutTargets(task))


class _WithoutTargets(Task):
    """A task of samples whose targets nobody knows."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def collate(self, targets: Any) -> Any:
        return stack(targets)

    def outputs(self, classes: Any) -> int | None:
        return self.task.outputs(classes)


def predict(ready: Ready, asked: Prediction, say: Callable[[str], None] = lambda text: None) -> list[Row]:
    """Predict all samples of *ready*'s data; returns the rows on rank 0 unless they go to a file. Run on every rank.

    A row has ``sample`` and ``prediction``, what the task adds, and last ``error``: why an image could not be read, else None.
    Rank 0 gets the rows of a batch at a time; masks are written by the rank that has them.
    """
    engine, runtime, source = ready.engine, ready.runtime, ready.data.val
    assert isinstance(source, Unlabelled)
    name = asked.out / TABLE if asked.out is not None and asked.folder else asked.out
    if asked.draw is not None and runtime.pipeline_ranks > 1:
        raise UserError("--draw: a pipeline's last stage has no images: use --parallel.strategy fsdp")
    table = all_or_none(lambda: open_table(name) if name is not None and runtime.is_main else None)
    rows, files = Rows(source, table), _files(source) if asked.folder or asked.draw else []
    batches = Validation(ready.config, ready.data, ready.blueprint, runtime, engine.eval_batch)
    try:
        for batch in ready.display.batches("prediction", batches, batches.number):
            ready.watch.waits_for_data(False)
            scores = engine.predict_step(batch, mirrored=asked.tta == "flip")
            mine = partial(_predicted, engine.task, scores, batch, source.classes, asked, files)
            parts = gather_json([all_or_none(mine), [(bad.id, bad.reason) for bad in batches.unreadable()]])
            if runtime.is_main:
                rows.add(*({id: value for part in parts for id, value in part[kind]} for kind in (0, 1)))
            ready.watch.beat("evaluate", engine.step)
        all_or_none(rows.finish)
    except BaseException:
        if table is not None:
            table.discard()
        raise
    finally:
        batches.close()
    if rows.unreadable:
        say(f"{rows.unreadable} of {len(source)} images could not be read: the column error says why")
    return rows.kept


def _predicted(
    task: Task, scores: list[Any], batch: Batch, classes: list[str], asked: Prediction, files: list[PurePath]
) -> list[tuple[int, Row]]:
    """The rows of this rank's samples that could be read, each with the sample's place; masks and drawings are on the disk."""
    predicted = [row for part in scores for row in task.predict(part, classes, asked.top)]
    found = []
    if not predicted:  # a stage without outputs
        return found
    for number, (id, valid, row) in enumerate(zip(batch.ids.tolist(), batch.valid.tolist(), predicted, strict=True)):
        if valid:
            if asked.draw is not None:
                write_image(asked.draw / files[id], task.draw(batch.images[number].cpu(), row).permute(1, 2, 0).numpy())
            found.append((id, {name: _plain(value, id, asked, files) for name, value in row.items()}))
    return found


def _plain(value: Any, id: int, asked: Prediction, files: list[PurePath]) -> Any:
    """*value* as JSON: of a mask the path of its file, below the folder; of a number six digits."""
    if isinstance(value, Tensor) and value.ndim == 2:
        assert asked.out is not None
        labels = value.cpu().numpy()
        write_image(asked.out / files[id], labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16))
        return str(files[id])
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _files(source: Unlabelled) -> list[PurePath]:
    """The PNG file of each sample, below a folder: its own name with another ending, which stays where names would be alike."""
    # A key of an archive may be any text.
    names = [
        PurePath(*[part for part in path.parts if part not in ("..", path.anchor)] or [str(index)])
        for index in range(len(source))
        for path in (PurePath(source.called(index)),)
    ]
    plain = [name.with_name(f"{name.stem}.png") for name in names]
    return plain if len(set(plain)) == len(plain) else [name.with_name(f"{name.name}.png") for name in names]


class Rows:
    """The rows of all samples in their order; rank 0 has them."""

    def __init__(self, source: Unlabelled, table: Table | None) -> None:
        self.source, self.table = source, table
        self.kept: list[Row] = []
        """Where there is no table."""
        self.unreadable = 0
        self._columns: list[str] = []
        self._waiting: list[tuple[int, str]] = []
        """Unreadable samples at the beginning: nobody knows the columns yet."""

    def add(self, found: dict[int, Row], unreadable: dict[int, str]) -> None:
        """Take the samples that follow those before: rows, and reasons, by their places."""
        self.unreadable += len(unreadable)
        self._columns = self._columns or list(next(iter(found.values()), ()))
        waiting = [*self._waiting, *unreadable.items()]
        if not self._columns:
            self._waiting = waiting
            return
        self._waiting = []
        empty = dict.fromkeys(self._columns)
        full = {id: row | {"error": None} for id, row in found.items()} | {id: empty | {"error": why} for id, why in waiting}
        self._write([{"sample": self.source.called(id)} | full[id] for id in sorted(full)])

    def finish(self) -> None:
        """End the table."""
        if self._waiting:
            rows = [{"sample": self.source.called(id), "prediction": None, "error": why} for id, why in self._waiting]
            self._write(rows)
        if self.table is not None:
            self.table.finish()

    def _write(self, rows: list[Row]) -> None:
        if self.table is None:
            self.kept += rows
        else:
            self.table.write(rows)
