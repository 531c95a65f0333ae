"""What a run says of its data at the start: what was found and where, and what was not taken."""

from __future__ import annotations

import os

from bigvision.data.sources.base import Mixture, PassedOver, Source

REASONS = CLASSES = 5
"""Shown of each; the rest is an ellipsis."""
LOOKED_AT = 16
"""Images of which the size is read, evenly spread."""


def describe(train: Source, val: Source) -> list[str]:
    """Two lines, and one more for each note of a source."""
    classes = [_plain(name)[:40] for name in train.classes[:CLASSES]]
    second = f"classes: {', '.join(classes)}{', …' if len(train.classes) > CLASSES else ''}"
    if sizes := _sizes(train):
        second += f"; images of {sizes} pixels"
    notes = [f"{split}: {note}" for split, source in (("train", train), ("val", val)) for note in source.notes]
    return [f"train: {_found(train, with_classes=True)}; val: {_found(val, with_classes=False)}", second, *notes]


def _found(source: Source, *, with_classes: bool) -> str:
    text = _counted(len(source), source.noun)
    if with_classes:
        text += f" in {_counted(len(source.classes), 'class')}"
    sources = source.sources if isinstance(source, Mixture) else [source]
    text += f" ({' + '.join(_plain(_shortened(one.location) or one.name) for one in sources)})"
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


def _shortened(path: str) -> str:
    """*path*, relative where it is below the working directory."""
    here = os.path.join(os.getcwd(), "")
    return path.removeprefix(here)


def _plain(text: str) -> str:
    """*text* on one line, of what every terminal takes: names of files may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
