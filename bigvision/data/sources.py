"""Datasets by name: ``digits``, ``imagefolder:PATH``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100``,
``synthetic:SAMPLESxSIZE``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bigvision.data.arrays import Synthetic, open_digits, open_torchvision
from bigvision.data.folder import open_image_folder
from bigvision.data.sample import Source, Split
from bigvision.errors import UserError, nearest

TORCHVISION = ("mnist", "fashion-mnist", "cifar10", "cifar100")
DATASETS = ("digits", "imagefolder", *TORCHVISION, "synthetic")


def check_source(spec: str, *, key: str) -> None:
    """Raise `UserError` where *spec* is no name of a dataset; opens nothing, so it may run before anything else."""
    name, argument = _parse(spec, key)
    if name == "synthetic":
        _synthetic(argument, key)


def open_source(
    spec: str,
    split: Split,
    *,
    key: str | None = None,
    root: str | None = None,
    download: bool = False,
    shared: bool = True,
    classes: Sequence[str] | None = None,
) -> Source:
    """Open the dataset *spec*.

    Args:
        spec: ``digits``, ``imagefolder:PATH``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100`` or
            ``synthetic[:SAMPLES[xSIZE]]`` (1024x224).
        split: what to open of it. Synthetic data has one split.
        key: the configuration's key, for messages; ``data.train`` or ``data.val`` by default.
        root: the folder of downloaded datasets; ``data`` in the working directory by default.
        download: fetch what is missing. Of several ranks let one open with it first, then the others without.
        shared: whether training and validation both name this dataset. An image folder without a validation folder
            is split only then.
        classes: of the training data, when opening the validation data: labels will follow them.

    Raises:
        UserError: unknown, missing or malformed data, or classes that do not agree; one line that names *key*.
    """
    key = key or f"data.{split}"
    name, argument = _parse(spec, key)
    if name == "imagefolder":
        return open_image_folder(argument, split, key=key, shared=shared, classes=classes)
    source: Source
    if name == "digits":
        source = open_digits(split)
    elif name == "synthetic":
        source = _synthetic(argument, key)
    else:
        source = open_torchvision(name, split, key=key, root=root, download=download)
    if classes is not None and list(classes) != source.classes:
        raise UserError(f"{key}: the {len(source.classes)} classes of {spec!r} are not the {len(classes)} of the training data")
    return source


def _parse(spec: str, key: str) -> tuple[str, str]:
    name, colon, argument = spec.partition(":")
    if name not in DATASETS:
        if ("/" in spec or not nearest(name, DATASETS)) and spec and Path(spec).expanduser().is_dir():
            raise UserError(f"{key}: unknown dataset {spec!r}; did you mean 'imagefolder:{spec}'?")
        hint = nearest(name, DATASETS) or f"; known are {', '.join(DATASETS)}"
        raise UserError(f"{key}: unknown dataset {spec!r}{hint}")
    if name == "imagefolder" and not argument:
        raise UserError(f"{key}: {spec!r} names no folder; write imagefolder:PATH")
    if colon and name not in ("imagefolder", "synthetic"):
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
