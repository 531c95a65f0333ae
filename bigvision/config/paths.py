"""Paths in a configuration, and the output folder of a run that names none."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bigvision.config.schema import Config
from bigvision.errors import UserError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?=/|[^/])")
"""``s3://bucket``, and ``s3:/bucket``, which `Path` makes of it."""
PATHS = {
    "out": "checkpoints cannot be written to a URL yet: write to a local or mounted folder, and copy it when the run has ended",
    "model.weights": "weights are not read from URLs: download the file and name it, or use model.pretrained",
    "data.root": "datasets are not read from URLs: name a local or mounted folder",
    "data.classes": "it is not read from a URL: download the file and name it",
    "data.trace": "it cannot be written to a URL: name a local file",
    "parallel.deepspeed": "it is not read from a URL: download the file and name it",
    "checkpoint.resume": "checkpoints are not read from URLs yet: download the step folder and name it",
}
"""The keys whose values are paths, and why none can be a URL."""
AUTO = "auto"
"""The value of ``out`` that is made of recipe, model and data."""
LONGEST = 120
"""Characters of a folder that is made here; file systems allow 255."""
GENERAL = {"train", "training", "val", "valid", "validation", "test", "images", "imgs", "image", "data", "dataset", "shards"}
"""Folders that many datasets have: the one above says which dataset it is."""


def local_path(key: str, text: str) -> str:
    """The path *text* with the home folder for ``~`` and values for components such as ``$SCRATCH``.

    Raises:
        UserError: empty, a URL, an unknown user or a variable that is not set.
    """
    if not text.strip():
        raise UserError(f"{key}: {text!r} names nothing: write a path{', or null' if key not in ('out', 'data.root') else ''}")
    if URL.match(text):
        raise UserError(f"{key}: {text}: {PATHS[key]}")
    if text != text.strip() or not text.isprintable():
        raise UserError(f"{key}: {text!r} begins or ends with a space, or has a character that cannot be seen: remove it")
    parts = []
    for part in text.split("/"):
        if found := re.fullmatch(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", part, re.ASCII):
            name = found[1] or found[2]
            if not os.environ.get(name):
                raise UserError(f"{key}: {text}: the environment variable {name} is not set: set it, or write the path itself")
            part = os.environ[name]
        parts.append(part)
    path = Path("/".join(parts))
    try:
        return str(path.expanduser())
    except RuntimeError:
        raise UserError(f"{key}: {text}: there is no home folder of {path.parts[0]!r}: write the path itself") from None


def made_out(config: Config, stem: str) -> str:
    """The output folder of a run that names none, a function of the recipe's *stem* ("" without one), data and model.

    Raises:
        UserError: the data's name is of no use for a folder.
    """
    names = [*map(_data_name, config.data.train.split(" + ")), _plain(config.model.name.rpartition("/")[2])]
    # A dict, since a recipe is often called as its data.
    folder = "-".join(dict.fromkeys([stem, *names] if stem else names))
    if not all(names) or len(folder) > LONGEST:
        raise UserError(
            f"out: no folder can be named after data.train: {config.data.train} and model.name: {config.model.name}: "
            "give one, such as --out checkpoints/first"
        )
    return f"checkpoints/{folder}"


def _data_name(spec: str) -> str:
    """The name of one dataset: "pets" for ``0.5*imagefolder:/data/pets/train``."""
    kind, colon, argument = re.sub(r"^\s*[0-9.eE+-]+\s*\*", "", spec).strip().partition(":")
    if not colon or kind == "synthetic":
        return _plain(kind)
    if kind == "python":
        return _plain(argument)
    *above, last = Path(os.path.abspath(Path(argument.partition("?")[0]).expanduser())).parts
    if not _plain(last):
        return ""
    if re.search(r"[*{[]|\.\w{2,8}$", last):
        # Files: shards such as flowers-{000..099}.tar are called flowers.
        last = re.split(r"[*{[]|[-_.]?\d|\.\w{2,8}$", last)[0]
    names = [name for part in (*above, last) if (name := _plain(part))]
    return next((name for name in reversed(names) if name.lower() not in GENERAL), _plain(last))


def _plain(name: str) -> str:
    """*name* with what file systems and shells take alike."""
    return re.sub(r"[^\w.]+", "-", name.rpartition(":")[2]).strip("-._ ")
