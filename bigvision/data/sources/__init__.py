"""Datasets by name: ``digits``, ``imagefolder:PATH``, ``webdataset:PATH``, ``parquet:PATH``, ``csv:PATH``, ``hf:PATH``,
``arrays:PATH``, ``volumes:PATH``, torchvision's, ``synthetic:SAMPLESxSIZE``, and several of them with weights:
``0.7*imagefolder:A + 0.3*webdataset:B``.

In come such a name, or a dataset of the user's, and a split; out comes a `Source`, which gives an encoded image and its label
by index. Read ``base.py`` first, then ``folder.py`` as an example. A new format is a file with a `Source` and an ``open_...``
function, and a line in `FILES`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bigvision.config import with_variables
from bigvision.data.labels import Target, read_classes
from bigvision.data.sources.arrays import Synthetic, open_arrays, open_digits
from bigvision.data.sources.arrow import open_parquet, open_saved
from bigvision.data.sources.base import Mixture, Opening, Source, Split
from bigvision.data.sources.custom import MapDataset, as_source, check_classes, choose_part
from bigvision.data.sources.folder import open_image_folder
from bigvision.data.sources.masks import open_mask_folder
from bigvision.data.sources.shards import open_shards
from bigvision.data.sources.table import open_table
from bigvision.data.sources.torchvision_sets import TORCHVISION, open_torchvision
from bigvision.data.splits import check_apart, check_local, from_the_hub, hold_out, matching
from bigvision.errors import UserError, either, nearest

Opener = Callable[[str, Opening], Source]
"""Opens what the text after a dataset's name says."""


def _open_volumes(argument: str, opening: Opening) -> Source:
    # Imported here: ``python -m bigvision.data.sources.volumes`` must not find it imported already.
    from bigvision.data.sources.volumes import open_volumes

    return open_volumes(argument, opening)


def _open_folder(argument: str, opening: Opening) -> Source:
    return (open_mask_folder if opening.target == "mask" else open_image_folder)(argument, opening)


FILES: dict[str, Opener] = {
    "imagefolder": _open_folder,
    "webdataset": open_shards,
    "parquet": open_parquet,
    "csv": partial(open_table, "csv"),
    "tsv": partial(open_table, "tsv"),
    "hf": open_saved,
    "arrays": open_arrays,
    "volumes": _open_volumes,
}
"""Those that are in a folder of the user's, whose path follows the name."""
OPENERS: dict[str, Opener] = {
    "digits": lambda _, opening: open_digits(opening.split),
    **FILES,
    **{name: partial(open_torchvision, name) for name in TORCHVISION},
    "synthetic": lambda argument, opening: _synthetic(argument, opening.key),
}
DATASETS = tuple(OPENERS)
SEVERAL = ("csv", "tsv", "parquet", "hf", "arrays")
TARGETS: dict[Target, tuple[str, ...]] = {"label": DATASETS, "labels": SEVERAL, "numbers": SEVERAL, "mask": ("imagefolder",)}
"""Of each kind of target the datasets that have it, beside those from Python."""


class Named(NamedTuple):
    """One of the datasets that a name mixes."""

    spec: str
    name: str
    argument: str
    """what follows the colon"""
    weight: float


def check_source(spec: str, *, key: str) -> None:
    """Raise `UserError` where *spec* is no name of a dataset; opens nothing, so it may run before anything else."""
    for one in _named(spec, key):
        if one.name == "synthetic":
            _synthetic(one.argument, key)


def open_source(
    spec: str | Source | MapDataset,
    split: Split,
    *,
    key: str | None = None,
    root: str | None = None,
    first: bool = False,
    shared: bool = True,
    classes: Sequence[str] | None = None,
    class_file: str | None = None,
    target: Target = "label",
    ignore: int = 255,
) -> Source:
    """Open the dataset *spec*.

    Args:
        spec: a name (see :data:`DATASETS`), for files ``NAME:PATH``, ``synthetic[:SAMPLES[xSIZE]]`` (1024x224), or several with
            weights, ``0.7*imagefolder:A + 0.3*webdataset:B``; or a dataset of your own (see :class:`MapStyle`), or a source.
        split: what to open of it. Synthetic data has one split.
        key: the configuration's key, for messages; ``data.train`` or ``data.val`` by default.
        root: the folder of downloaded datasets; ``data`` in the working directory by default.
        first: download what is missing, write indexes beside files, and report on stderr how far that is. Of several ranks let
            one open with it before the others do without.
        shared: whether training and validation both name this dataset. Files without a validation part are split only then.
        classes: of the training data, when opening the validation data: labels will follow them.
        class_file: has the classes, instead of the data's own order (see :func:`~bigvision.data.labels.read_classes`).
        target: what the task needs of each sample.
        ignore: of masks, the id that stands for no label.

    Raises:
        UserError: unknown, missing or malformed data, or classes that do not agree; one line that names *key*.
    """
    opening = Opening(split, key or f"data.{split}", shared, classes, target, ignore, root, first)
    if classes is None:
        opening = opening._replace(classes=_classes_in(class_file))
    if not isinstance(spec, str):
        return as_source(spec, opening)
    parts = _named(spec, opening.key)
    return _mixed(parts, _open_parts(parts, opening, [shared] * len(parts)))


def open_both(
    train: str | Source | MapDataset, val: str | Source | MapDataset, *, root: str | None = None, first: bool = False,
    class_file: str | None = None, target: Target = "label", ignore: int = 255,
) -> tuple[Source, Source]:  # fmt: skip
    """Open the training and the validation data of a run; the arguments are those of :func:`open_source`.

    Resolved paths tell whether both name one dataset, whole or as a part of a mixture. What has no validation part of its own
    is then divided: a tenth is held out.

    Raises:
        UserError: as :func:`open_source`, or much of the validation data is in the training data (:func:`check_apart`).
    """
    keys = ("data.train", "data.val")
    if not isinstance(train, str) or not isinstance(val, str):
        kind: dict[str, Any] = {"root": root, "first": first, "shared": False, "target": target, "ignore": ignore}
        first_source = open_source(train, "train", class_file=class_file, **kind)
        second = open_source(val, "val", classes=first_source.classes, **kind)
        if choose_part(train, "train", keys[0]) is not choose_part(val, "val", keys[1]):
            check_apart(first_source, second)
            return first_source, second
        otherwise = "data.val: the training data is one sample, none can be held out; give validation data"
        return hold_out(first_source, "train", otherwise), hold_out(first_source, "val", otherwise)
    ours, theirs = _named(train, keys[0]), _named(val, keys[1])
    ids, val_ids = _identities(ours, keys[0]), _identities(theirs, keys[1])
    opening = Opening("train", keys[0], True, _classes_in(class_file), target, ignore, root, first)
    opened = _open_parts(ours, opening, [one in val_ids for one in ids])
    opening = Opening("val", keys[1], True, opened[0].classes, target, ignore, root, first)
    held = _open_parts(theirs, opening, [one in ids for one in val_ids])
    for one, source in zip(ids, opened):
        for other, checked in zip(val_ids, held):
            if not (one == other and source.divided and checked.divided):
                check_apart(source, checked)
    return _mixed(ours, opened), _mixed(theirs, held)


def open_validation(
    train: str, val: str, *, classes: Sequence[str], root: str | None = None, first: bool = False, target: Target = "label",
    ignore: int = 255,
) -> Source:  # fmt: skip
    """Open the validation data that :func:`open_both` opens, without the training data, which may be gone: labels follow its
    *classes*."""
    parts, train_ids = _named(val, "data.val"), _identities(_named(train, "data.train"), "data.train")
    shared = [one in train_ids for one in _identities(parts, "data.val")]
    opening = Opening("val", "data.val", True, list(classes), target, ignore, root, first)
    return _mixed(parts, _open_parts(parts, opening, shared))


def _classes_in(file: str | None) -> list[str] | None:
    if file is None:
        return None
    check_local(file, "data.classes")
    return read_classes(file, "data.classes")


def _identities(parts: Sequence[Named], key: str) -> list[tuple[str, object]]:
    """Of each what is equal for two names of one dataset: resolved paths, without the options after them."""
    found: list[tuple[str, object]] = []
    for _, name, argument, _ in parts:
        path = os.path.expanduser(re.sub(r"\?\w+=.*$", "", argument, flags=re.DOTALL))
        suffix = {"webdataset": ".tar", "parquet": ".parquet", "csv": ".csv", "tsv": ".tsv"}.get(name)
        if name not in FILES:
            found.append((name, argument))
        elif suffix is not None and not os.path.exists(path):
            found.append((name, tuple(sorted(os.path.realpath(file) for file in matching(path, suffix, key)))))
        else:
            found.append((name, os.path.realpath(path)))
    return found


def _mixed(parts: Sequence[Named], sources: list[Source]) -> Source:
    return sources[0] if len(sources) == 1 else Mixture(sources, [part.weight for part in parts])


def _open_parts(parts: Sequence[Named], opening: Opening, shared: Sequence[bool]) -> list[Source]:
    sources: list[Source] = []
    for (spec, name, argument, _), both in zip(parts, shared):
        if name not in (having := TARGETS.get(opening.target, ())):
            needed = {"label": "a label", "labels": "several labels", "numbers": "numbers", "mask": "a mask"}
            fix = f"use {either(having)}" if having else "give a dataset from Python"
            raise UserError(f"{opening.key}: {name} does not give {needed.get(opening.target, 'what')} the task needs: {fix}")
        source = OPENERS[name](argument, opening._replace(shared=both))
        if opening.target == "numbers":
            source.unit = "number"
        check_classes(source, opening)
        sources.append(source)
        opening = opening._replace(classes=sources[0].classes)
        if source.channels != sources[0].channels or source.style != sources[0].style:
            raise UserError(f"{opening.key}: {spec} has other images ({source.style}) than {parts[0].spec}; mix what is alike")
    return sources


def _named(spec: str, key: str) -> list[Named]:
    """The datasets that *spec* mixes."""
    found = []
    for part in spec.split(" + "):
        match = re.fullmatch(r"\s*(?:([0-9.eE+-]+)\s*\*\s*)?(.*?)\s*", part, re.DOTALL)
        assert match is not None
        try:
            weight = float(match[1]) if match[1] else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"{key}: {part.strip()!r}: the weight before * must be a number above 0")
        found.append(Named(match[2], *_parsed(match[2], key), weight))
    return found


def _parsed(spec: str, key: str) -> tuple[str, str]:
    check_local(spec, key)
    name, colon, argument = spec.partition(":")
    if name == "python":
        raise UserError(f"{key}: the data of this run was given from Python ({argument}): name a dataset to read instead")
    if name not in DATASETS:
        if ("/" in spec or not nearest(name, DATASETS)) and spec and Path(spec).expanduser().is_dir():
            raise UserError(f"{key}: unknown dataset {spec!r}; did you mean 'imagefolder:{spec}'?")
        if hub := from_the_hub(spec):
            raise UserError(f"{key}: {spec!r} is no folder here; if it is a dataset of the Hugging Face Hub, {hub}")
        hint = nearest(name, DATASETS) or f"; known are {', '.join(DATASETS)}"
        raise UserError(f"{key}: unknown dataset {spec!r}{hint}")
    if name in FILES and not argument:
        raise UserError(f"{key}: {spec!r} names no folder; write {name}:PATH")
    if colon and name not in (*FILES, "synthetic"):
        raise UserError(f"{key}: {name} takes nothing after its name, got {spec!r}; write {name!r}")
    return name, with_variables(key, argument) if name in FILES else argument


def _synthetic(argument: str, key: str) -> Synthetic:
    match = re.fullmatch(r"(?:([1-9]\d*)(?:x([1-9]\d*))?)?", argument)
    if not match:
        raise UserError(f"{key}: 'synthetic:{argument}' is not synthetic:SAMPLES[xSIZE], as synthetic:1024x224")
    return Synthetic(*(int(number) for number in match.groups() if number))
