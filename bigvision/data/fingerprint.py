"""What a dataset is, wherever it lies: recorded by a run, and compared when the run goes on.

It has no absolute path and no time in it, so the same data copied elsewhere have the same fingerprint.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from xxhash import xxh3_64, xxh3_64_hexdigest

from bigvision.data.sources.base import Source

SIZES = 1000
"""Samples whose size is looked at: a million files must not need a million calls of stat."""
TOGETHER = 4096
"""Samples that are hashed at a time."""


def fingerprint(source: Source, python: bool = False) -> dict[str, Any]:
    """Describe *source* as plain data.

    Args:
        python: the dataset was given as an object: only its length is known without reading it.

    Returns:
        ``samples`` and, as hashes, ``labels``, ``names`` and ``sizes``; without the last two where the source has none.
        Labels are hashed by the names of their classes, so that another order of classes changes no label.
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
