"""The files in which weights are given: safetensors, one or several with an index; and the prefixes of tensor names."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigvision.disk import read_into
from bigvision.errors import UserError, either
from bigvision.fragments import PICKLE, TYPES, Place, bytes_of, file_kind, read_header, unique

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # put into names by compile, recompute, FSDP
COUNTERS = ("n_averaged",)  # what `torch.optim.swa_utils.AveragedModel` keeps beside a model
DEEPEST = 5  # components that a prefix may have, as ``module.model.teacher.backbone.``
PICKLED = {".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl"}
INDEX = "model.safetensors.index.json"
CHUNK = 8 << 20  # bytes held at a time where values are converted or go to another device
LARGEST_INDEX = 100_000_000  # bytes; safetensors' own limit for a header
MARK = "?prefix="  # between a file and the prefix of the tensors that are meant
REPAIR = "fetch or write it again"


def plain_name(name: str) -> str:
    """*name* without the components of `WRAPPERS`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class WeightsFile:
    """The tensors of a file, or of the shards of an index, by name. Their values stay on the disk until they are read."""

    def __init__(self, source: str, key: str) -> None:
        """Open what *source* names: a .safetensors file, an index or a folder that holds one of the two.

        ``SOURCE?prefix=teacher.backbone.`` names the tensors of which `fit` takes the rest of the name. Raises `UserError`,
        which begins with *key*, when it is not such a file, or damaged.
        """
        source, marked, prefix = source.partition(MARK)
        self.source, self.key = source, key
        self.prefix = prefix if marked else None
        self.stored: dict[str, str] = {}  # the file's own name of each tensor that `fit` renamed
        path = _locate(source, key)
        self.folder = path.parent
        self.places: dict[str, Place] = {}
        if path.suffix == ".json":
            for shard, names in _shards(self, path).items():
                self._add(shard, names)
        else:
            self._add(path.name, None)

    def fit(self, expected: Collection[str]) -> str | None:
        """Take of each name what a model that has the names *expected* calls the tensor; returns a line about a prefix.

        Raises `UserError` when several parts of the file fit the model, or nothing has the prefix that was asked for.
        """
        prefix = self.prefix
        plain = {name: plain_name(name) for name in self.places}
        if prefix is None:
            prefix = self._prefix(plain.values(), expected)
        taken = {name: short.removeprefix(prefix) for name, short in plain.items() if short.startswith(prefix)}
        if not prefix:
            taken = {name: short for name, short in taken.items() if short not in COUNTERS}
        if not taken:
            fix = "look at its names, such as " + next(iter(plain), "-")
            raise self.mistake(f"has no tensor whose name begins with {prefix}", fix)
        if twice := [name for name, count in Counter(taken.values()).items() if count > 1]:
            raise self.mistake(f"has {twice[0]} under several names", "name one of them with ?prefix=")
        left = [name for name in self.places if name not in taken]
        self.places = {short: self.places[name] for name, short in taken.items()}
        self.stored = {short: name for name, short in taken.items()}
        if not prefix:
            return None
        more = f"; {len(left)} others are left out, such as {left[0]}" if left else ""
        return f"{self.key}: the {len(taken)} tensors of {self.source} whose names begin with {prefix}{more}"

    def _prefix(self, names: Iterable[str], expected: Collection[str]) -> str:
        """The prefix under which *names* has all of *expected*; "" where there is none.

        Names that only a filter of timm's understands never match all, and are left to it.
        """
        matches: Counter[str] = Counter()
        for parts in (name.split(".") for name in names):
            for depth in range(min(DEEPEST + 1, len(parts))):
                matches["".join(f"{part}." for part in parts[:depth])] += ".".join(parts[depth:]) in expected
        alike = sorted(prefix for prefix, count in matches.items() if count == len(expected))
        if not alike or "" in alike:
            return ""
        if len(alike) > 1:  # as those of a student and a teacher
            words = f"{either(alike)}: choose one, such as {self.source}{MARK}{alike[-1]}"
            raise UserError(f"{self.key}: {self.source} has the model's tensors under {words}")
        return alike[0]

    def trained_at(self) -> tuple[int, int] | None:
        """Height and width of the images that the weights were trained on, where timm's config.json lies beside them."""
        try:
            card = json.loads((self.folder / "config.json").read_bytes())
            size = card.get("model_args", {}).get("img_size") or card["pretrained_cfg"]["input_size"][1:]
            height, width = (size, size) if isinstance(size, int) else size
            return int(height), int(width)
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return None  # another program's

    def mistake(self, what: str, fix: str = REPAIR) -> UserError:
        """The error that names the key, the source and *what* is wrong with it, in one line whatever names the file has."""
        return UserError(f"{self.key}: {self.source} {' '.join(what.split())}; {fix}")

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is stored."""
        return TYPES[self.places[name].dtype]

    def read(self, name: str, start: int, values: Tensor) -> None:
        """Fill the 1-D *values* with the elements of a tensor from *start* on, in their type and on their device."""
        place, dtype = self.places[name], self.dtype(name)
        count = values.numel()
        if not 0 <= start <= start + count <= math.prod(place.shape):
            raise RuntimeError(f"elements {start} to {start + count} of {name} {place.shape}")
        in_place = values.dtype == dtype and values.device.type == "cpu"
        step = count if in_place else min(count, CHUNK // dtype.itemsize)
        buffer = values if in_place else torch.empty(step, dtype=dtype, device="cpu")
        try:
            descriptor = os.open(self.folder / place.file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                for begin in range(0, count, step or 1):
                    part = values[begin : begin + step]
                    read_into(descriptor, bytes_of(buffer[: len(part)]), place.offset + (start + begin) * dtype.itemsize)
                    if not in_place:
                        part.copy_(buffer[: len(part)])
            finally:
                os.close(descriptor)
        except (OSError, EOFError) as error:
            raise self.mistake(f"cannot be read: {place.file}: {error}") from error

    def whole(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        values = torch.empty(self.places[name].shape, dtype=self.dtype(name), device="cpu")
        self.read(name, 0, values.view(-1))
        return values

    def _add(self, file: str, listed: set[str] | None) -> None:
        """Take up the tensors of one file; *listed* are those that the index says it has."""
        try:
            found = read_header(self.folder / file)
        except ValueError as error:
            kind, shard = file_kind(self.folder / file), "" if listed is None else f"has a shard {file} that "
            fix = "call it .pth and convert it once (bigvision convert)" if kind == PICKLE else REPAIR
            what = f"is {kind}" if kind else f"is damaged or not safetensors ({error})"
            raise self.mistake(shard + what, fix) from error
        for name, place in found.items():
            if place.dtype not in TYPES:
                raise self.mistake(f"holds {name} as {place.dtype}", f"convert it to one of {', '.join(TYPES)}")
            if name in self.places:
                raise self.mistake(f"has {name} twice: in {self.places[name].file} and in {file}")
            if listed is not None and name not in listed:
                raise self.mistake(f"does not list {name} in {file}, which has it")
        if listed is not None and (absent := sorted(listed - found.keys())):
            raise self.mistake(f"lists {absent[0]} in {file}, which does not have it ({len(absent)} such)")
        self.places.update(found)


def refuse_pickled(source: str, key: str) -> None:
    """Raise `UserError` for a pickled file, with the command that converts it."""
    path = Path(source)
    if path.suffix.lower() in PICKLED and not path.expanduser().is_dir():
        command = shlex.join(["bigvision", "convert", source, str(path.with_suffix(".safetensors"))])
        raise UserError(f"{key}: {source} is a pickled file, which can run code when read; convert it once: {command}")


def _locate(source: str, key: str) -> Path:
    """The .safetensors or index file that *source* means."""
    refuse_pickled(source, key)
    path = Path(source).expanduser()
    if path.is_dir():
        found = next((path / name for name in ("model.safetensors", INDEX) if (path / name).exists()), None)
        if found is None:
            for file in sorted(path.iterdir()):
                refuse_pickled(str(Path(source) / file.name), key)
            raise UserError(f"{key}: {source} holds neither model.safetensors nor {INDEX}; name a file, or a folder that does")
        return found
    if path.suffix.lower() != ".safetensors" and not path.name.endswith(".safetensors.index.json"):
        raise UserError(
            f"{key}: {source} is not a .safetensors file, an index (.safetensors.index.json) or a folder with one; "
            "name the file itself, or convert it"
        )
    if not path.is_file():
        raise UserError(f"{key}: {source} does not exist; check the path")
    return path


def shards_of(index: Path) -> dict[str, set[str]]:
    """The tensors that an index lists for each shard; every shard is a plain name of a safetensors file.

    Raises `ValueError` when it is not such an index, `OSError` when it cannot be read.
    """
    if (size := index.stat().st_size) > LARGEST_INDEX:
        raise ValueError(f"it has {size} bytes")
    try:
        content: Any = json.loads(index.read_bytes(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise ValueError("it has no weight_map")
    shards: dict[str, set[str]] = {}
    for name, shard in listed.items():
        # A name is never a path: nothing outside the folder is ever opened.
        if not isinstance(shard, str) or shard != os.path.basename(shard) or not shard.endswith(".safetensors"):
            raise ValueError(f"it names {shard!r}, which is not the plain name of a .safetensors file")
        shards.setdefault(shard, set()).add(name)
    return shards


def _shards(file: WeightsFile, index: Path) -> dict[str, set[str]]:
    """The tensors that an index lists for each shard, every one of which is a file beside it."""
    try:
        shards = shards_of(index)
    except (OSError, ValueError) as error:
        raise file.mistake(f"is not an index of weights ({error})") from error
    home = index.parent.resolve()
    # In the cache of the Hugging Face hub a snapshot's files are links into the folder of blobs beside the snapshots.
    homes = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    for shard in sorted(shards):
        target = (index.parent / shard).resolve()
        if not any(target.is_relative_to(home) for home in homes):
            raise file.mistake(f"names {shard!r}, which is a link to a file elsewhere", "put the file itself there")
        if not target.is_file():
            raise file.mistake(f"lists {shard}, which is missing beside it", "fetch all of its files")
    return {shard: shards[shard] for shard in sorted(shards)}
