"""Datasets by name: ``digits``, ``imagefolder:PATH``, ``webdataset:PATH``, ``parquet:PATH``, ``csv:PATH``, ``hf:PATH``,
``arrays:PATH``, ``volumes:PATH``, torchvision's, ``synthetic:SAMPLESxSIZE``, and several of them with weights:
``0.7*imagefolder:A + 0.3*webdataset:B``.

In come such a name, or a dataset of the user's, and a split; out comes a `Source`, which gives an encoded image and its label
by index. Read ``base.py`` first, then ``folder.py`` as an example. A new format is a file with a `Source` and an ``open_...``
function, a name in `FILES` or `DATASETS`, and a line in `_open`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from bigvision.data.labels import read_classes
from bigvision.data.sources.arrays import Synthetic, open_arrays, open_digits
from bigvision.data.sources.base import Mixture, Source, Split
from bigvision.data.sources.custom import MapDataset, as_source, choose_part
from bigvision.data.sources.files import matching
from bigvision.data.sources.folder import open_image_folder
from bigvision.data.sources.huggingface import open_saved
from bigvision.data.sources.table import open_table
from bigvision.data.sources.torchvision_sets import TORCHVISION, open_torchvision
from bigvision.data.splits import check_apart, check_local, from_the_hub, hold_out
from bigvision.errors import UserError, nearest

FILES = ("imagefolder", "webdataset", "parquet", "csv", "tsv", "hf", "arrays", "volumes")
"""Those that are in a folder of the user's, whose path follows the name."""
DATASETS = ("digits", *FILES, *TORCHVISION, "synthetic")


def check_source(spec: str, *, key: str) -> None:
    """Raise `UserError` where *spec* is no name of a dataset; opens nothing, so it may run before anything else."""
    for one, _ in _weighted(spec, key):
        name, argument = _parse(one, key)
        if name == "synthetic":
            _synthetic(argument, key)


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
) -> Source:
    """Open the dataset *spec*.

    Args:
        spec: a name (see :data:`DATASETS`), for files ``NAME:PATH``, ``synthetic[:SAMPLES[xSIZE]]`` (1024x224), or several with
            weights, ``0.7*imagefolder:A + 0.3*webdataset:B``; or a dataset of your own (see :class:`MapStyle`), or a source.
        split: what to open of it. Synthetic data has one split.
        key: the configuration's key, for messages; ``data.train`` or ``data.val`` by default.
        root: the folder of downloaded datasets; ``data`` in the working directory by default.
        first: download what is missing, write indexes beside files, and tell on stderr how far that is. Of several ranks let
            one open with it before the others do without.
        shared: whether training and validation both name this dataset. Files without a validation part are split only then.
        classes: of the training data, when opening the validation data: labels will follow them.
        class_file: has the classes, instead of the data's own order (see :func:`~bigvision.data.labels.read_classes`).

    Raises:
        UserError: unknown, missing or malformed data, or classes that do not agree; one line that names *key*.
    """
    key = key or f"data.{split}"
    known = list(classes) if classes is not None else _classes_in(class_file)
    if not isinstance(spec, str):
        return as_source(spec, split, key=key, classes=known)
    parts = _weighted(spec, key)
    return _mixed(spec, _open_parts(spec, split, key, root, first, [shared] * len(parts), known), key)


def open_both(
    train: str | Source | MapDataset, val: str | Source | MapDataset, *, root: str | None = None, first: bool = False,
    class_file: str | None = None,
) -> tuple[Source, Source]:  # fmt: skip
    """Open the training and the validation data of a run; the arguments are those of :func:`open_source`.

    Resolved paths tell whether both name one dataset, whole or as a part of a mixture. What has no validation part of its own
    is then divided: a tenth is held out.

    Raises:
        UserError: as :func:`open_source`, or much of the validation data is in the training data (:func:`check_apart`).
    """
    keys = ("data.train", "data.val")
    if not isinstance(train, str) or not isinstance(val, str):
        first_source = open_source(train, "train", root=root, first=first, class_file=class_file, shared=False)
        second = open_source(val, "val", root=root, first=first, classes=first_source.classes, shared=False)
        if choose_part(train, "train", keys[0]) is not choose_part(val, "val", keys[1]):
            if note := check_apart(first_source, second):
                second.notes = (*second.notes, note)
            return first_source, second
        if len(first_source) < 2:
            raise UserError("data.val: the training data is one sample, none can be held out; give validation data")
        return hold_out(first_source, "train"), hold_out(first_source, "val")
    ids = [[_identity(one, key) for one, _ in _weighted(spec, key)] for spec, key in zip((train, val), keys)]
    known = _classes_in(class_file)
    opened = _open_parts(train, "train", keys[0], root, first, [one in ids[1] for one in ids[0]], known)
    held = _open_parts(val, "val", keys[1], root, first, [one in ids[0] for one in ids[1]], opened[0].classes)
    for one, source in zip(ids[0], opened):
        for other, checked in zip(ids[1], held):
            if one == other and source.divided and checked.divided:
                continue
            if note := check_apart(source, checked):
                checked.notes = (*checked.notes, note)
    return _mixed(train, opened, keys[0]), _mixed(val, held, keys[1])


def open_validation(
    train: str, val: str, *, classes: Sequence[str], root: str | None = None, first: bool = False
) -> Source:  # fmt: skip
    """Open the validation data that :func:`open_both` opens, without the training data, which may be gone.

    Args:
        classes: of the training data, which labels follow.
    """
    keys = ("data.train", "data.val")
    ids = [[_identity(one, key) for one, _ in _weighted(spec, key)] for spec, key in zip((train, val), keys)]
    parts = _open_parts(val, "val", keys[1], root, first, [one in ids[0] for one in ids[1]], list(classes))
    return _mixed(val, parts, keys[1])


def _classes_in(file: str | None) -> list[str] | None:
    if file is None:
        return None
    check_local(file, "data.classes")
    return read_classes(file, "data.classes")


def _identity(spec: str, key: str) -> tuple[str, object]:
    """What is equal for two names of one dataset: resolved paths, without the options after them."""
    name, argument = _parse(spec, key)
    if name not in FILES:
        return name, argument
    path = os.path.expanduser(re.sub(r"\?\w+=.*$", "", argument, flags=re.DOTALL))
    if not os.path.exists(path) and name in ("webdataset", "parquet", "csv", "tsv"):
        suffix = ".tar" if name == "webdataset" else f".{name}"
        return name, tuple(sorted(os.path.realpath(file) for file in matching(path, suffix, key)))
    return name, os.path.realpath(path)


def _mixed(spec: str, sources: list[Source], key: str) -> Source:
    parts = _weighted(spec, key)
    return sources[0] if len(sources) == 1 else Mixture(sources, [weight for _, weight in parts])


def _open_parts(
    spec: str, split: Split, key: str, root: str | None, first: bool, shared: Sequence[bool], known: list[str] | None
) -> list[Source]:
    parts = _weighted(spec, key)
    sources: list[Source] = []
    for (one, _), divided in zip(parts, shared):
        sources.append(_open(one, split, key, root, first, divided, known))
        known = sources[0].classes
        if sources[-1].channels != sources[0].channels or sources[-1].style != sources[0].style:
            raise UserError(f"{key}: {one} has other images ({sources[-1].style}) than {parts[0][0]}; mix what is alike")
    return sources


def _open(
    spec: str, split: Split, key: str, root: str | None, first: bool, shared: bool, classes: list[str] | None
) -> Source:  # fmt: skip
    name, argument = _parse(spec, key)
    if name == "imagefolder":
        return open_image_folder(argument, split, key=key, shared=shared, classes=classes)
    if name == "webdataset":
        from bigvision.data.sources.shards import open_shards

        return open_shards(argument, split, key=key, shared=shared, classes=classes, first=first)
    if name == "parquet":
        from bigvision.data.sources.parquet import open_parquet

        return open_parquet(argument, split, key=key, shared=shared, classes=classes, first=first)
    if name in ("csv", "tsv"):
        return open_table(name, argument, split, key=key, shared=shared, classes=classes)
    if name == "hf":
        return open_saved(argument, split, key=key, shared=shared, classes=classes)
    if name == "volumes":
        from bigvision.data.sources.volumes import open_volumes

        return open_volumes(argument, split, key=key, shared=shared, classes=classes)
    source: Source
    if name == "arrays":
        source = open_arrays(argument, split, key=key, shared=shared, classes=classes)
    elif name == "digits":
        source = open_digits(split)
    elif name == "synthetic":
        source = _synthetic(argument, key)
    else:
        source = open_torchvision(name, split, key=key, root=root, download=first)
    if classes is not None and classes != source.classes:
        raise UserError(f"{key}: the {len(source.classes)} classes of {spec!r} are not the {len(classes)} of the training data")
    return source


def _weighted(spec: str, key: str) -> list[tuple[str, float]]:
    """The datasets that *spec* mixes, and their weights."""
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
        found.append((match[2], weight))
    return found


def _parse(spec: str, key: str) -> tuple[str, str]:
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
    return name, argument


def _synthetic(argument: str, key: str) -> Synthetic:
    if not argument:
        return Synthetic()
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", argument)
    if not match:
        raise UserError(
            f"{key}: 'synthetic:{argument}' is not synthetic:SAMPLES or synthetic:SAMPLESxSIZE, as synthetic:1024x224"
        )
    samples, size = match.groups()
    return Synthetic(int(samples), int(size)) if size else Synthetic(int(samples))
