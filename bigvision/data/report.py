"""What a dataset is, wherever it lies: the fingerprint that a run records, and the report at its start."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from xxhash import xxh3_64, xxh3_64_hexdigest

from bigvision.data.sources.base import Mixture, PassedOver, Source

SIZES = 1000
"""Samples whose size is looked at: a million files must not need a million calls of stat."""
TOGETHER = 4096
"""Samples that are hashed at a time."""
REASONS = CLASSES = 5
"""Shown of each; the rest is an ellipsis."""
LOOKED_AT = 16
"""Images of which the size is read, evenly spread."""


def fingerprint(source: Source, python: bool = False) -> dict[str, Any]:
    """Describe *source* as plain data: ``samples`` and, as hashes, ``labels`` and, where it has them, ``names`` and ``sizes``.

    Labels are hashed by the names of their classes, so that another order of classes changes no label. Of a dataset that was
    given as a Python object only the length is known without reading it.
    """
    count = len(source)
    found: dict[str, Any] = {"samples": count}
    if python or not count:
        return found
    names, labels, named = xxh3_64(), xxh3_64(), False
    classes = [name.encode("utf-8", "surrogateescape") for name in source.classes or ()]
    for begin in range(0, count, TOGETHER):
        some = range(begin, min(begin + TOGETHER, count))
        keys = [source.key(index) for index in some]
        named = named or any(keys)
        names.update(b"\0".join(keys) + b"\0")
        labels.update(b"\0".join(_label(source.label(index), classes) for index in some) + b"\0")
    found["labels"] = labels.hexdigest()
    if named:
        found["names"] = names.hexdigest()
    sizes = [_size(source, number * count // min(SIZES, count)) for number in range(min(SIZES, count))]
    if any(sizes):
        found["sizes"] = xxh3_64_hexdigest(np.asarray(sizes, dtype="<i8").tobytes())
    return found


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What sets two fingerprints apart, for messages; "" where nothing does that both record."""
    if before.get("samples") != now.get("samples"):
        return f"{now.get('samples'):,} samples instead of {before.get('samples'):,}"
    kinds = {"names": "samples of other names", "labels": "other labels", "sizes": "files of other sizes"}
    return ", ".join(text for kind, text in kinds.items() if kind in before and kind in now and before[kind] != now[kind])


def classes_difference(before: list[str], now: list[str]) -> str:
    """What sets two lists of class names apart, for messages; "" where nothing does."""
    if before == now:
        return ""
    if len(before) != len(now):
        return f"{len(now)} classes instead of {len(before)}"
    number = next(n for n, (old, new) in enumerate(zip(before, now)) if old != new)
    order = "the classes in another order" if sorted(before) == sorted(now) else "other classes"
    return f"{order} (class {number} is {now[number]!r}, not {before[number]!r})"


def _label(label: Any, classes: list[bytes]) -> bytes:
    if isinstance(label, int):
        return classes[label] if 0 <= label < len(classes) else str(label).encode()
    return np.asarray(label).tobytes()


def _size(source: Source, index: int) -> int:
    try:
        return source.size(index)
    except FileNotFoundError:
        return -1  # gone since it was listed: unreadable samples are counted elsewhere


def describe(train: Source, val: Source) -> list[str]:
    """Two lines, and one more for each note of a source."""
    classes = [_plain(name)[:40] for name in train.classes[:CLASSES]]
    units = "numbers" if train.unit == "number" else "classes"
    second = f"{units}: {', '.join(classes)}{', …' if len(train.classes) > CLASSES else ''}"
    if sizes := _sizes(train):
        second += f"; images of {sizes} pixels"
    notes = [f"{split}: {note}" for split, source in (("train", train), ("val", val)) for note in source.notes]
    return [f"train: {_found(train, with_classes=True)}; val: {_found(val, with_classes=False)}", second, *notes]


def _found(source: Source, *, with_classes: bool) -> str:
    text = _counted(len(source), source.noun)
    if with_classes:
        text += f" in {_counted(len(source.classes), source.unit)}"
    sources, here = source.sources if isinstance(source, Mixture) else [source], os.path.join(os.getcwd(), "")
    text += f" ({' + '.join(_plain(one.location.removeprefix(here) or one.name) for one in sources)})"
    passed_over = PassedOver()
    for one in sources:
        passed_over.include(one.passed_over)
    if passed_over:
        reasons = sorted(passed_over, key=lambda reason: -passed_over[reason][0])
        shown = [f"{passed_over[reason][0]:,} {_plain(reason)}" for reason in reasons[:REASONS]]
        shown += ["…"] if len(reasons) > REASONS else []
        total = sum(count for count, _ in passed_over.values())
        text += f", {total:,} passed over: {', '.join(shown)} (as {_plain(passed_over[reasons[0]][1])})"
    return text


def _sizes(source: Source) -> str:
    """Width and height of the images, from their headers: "500x375", or "500x375 to 1024x768"; "" where they are not known."""
    step = max(1, len(source) // LOOKED_AT)
    found = [size for index in range(0, len(source), step)[:LOOKED_AT] if (size := source.image_size(index)) is not None]
    shown = [f"{width}x{height}" for height, width in sorted(found, key=lambda size: size[0] * size[1])]
    return " to ".join(dict.fromkeys((shown[0], shown[-1]))) if shown else ""


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def _plain(text: str) -> str:
    """*text* on one line, of what every terminal takes: names of files may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
