"""Pickled weights rewritten as safetensors, by an explicit command; training and evaluation never read pickled files."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from bigvision.errors import UserError
from bigvision.fragments import PICKLE, file_kind
from bigvision.models.tracing import first_line
from bigvision.models.weights_file import COUNTERS, plain_name

CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
CONTAINERS += ("state_dict", "model", "model_state_dict", "weights", "net")
"""What training scripts call the weights in a checkpoint, first what timm takes first: averaged weights before the others."""
PLAIN: list[Any] = [
    argparse.Namespace, datetime.date, datetime.datetime, datetime.timedelta, pathlib.PosixPath, pathlib.PurePosixPath,
    list, dict, set, int, float, str, bool,
    # torch's reader fills plain dicts and lists alone.
    (lambda *arguments: {}, "collections.defaultdict"), (lambda *arguments: [], "collections.deque"),
]  # fmt: skip
"""What checkpoints hold beside weights that is data and no code: the command line that made them, dates, paths, counts."""
NO_WEIGHTS = re.compile(r"optim|sched|scaler|rng|loss|lr_|callback|hyper", re.IGNORECASE)  # names of what are no weights


def convert(source: str, target: str, take: str | None = None) -> list[str]:
    """Rewrite the pickled weights *source* as the safetensors file *target* and return what was done, a line each.

    The file is loaded with ``weights_only=True``, which runs no code of it, and is held in memory. Of a training checkpoint the
    averaged weights are taken where it has some, else the others, as timm does; *take* names others. Names lose the prefixes of
    DistributedDataParallel, ``torch.compile``, FSDP and recomputation, and keep those of the training program (``model.``,
    ``backbone.``), since only a model can tell them from its own: ``model.weights`` does. Values and types stay.
    """
    path, out = Path(source).expanduser(), Path(target).expanduser()
    if out.suffix.lower() != ".safetensors":
        raise UserError(f"convert: {target} is no name for the result; let it end in .safetensors")
    if out.exists():
        raise UserError(f"convert: {target} exists already; name another file or remove it")
    if not out.parent.is_dir():
        raise UserError(f"convert: {target} cannot be written: there is no folder {out.parent}; make it")
    found = _load(path, source)
    container = _container(found, source, take)
    inner = _flat(found if container is None else found[container])
    held = {plain_name(name): value for name, value in clean_state_dict(inner).items() if name not in COUNTERS}
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"convert: {source} has no tensors by name, only {_some(list(found))}; take them out of it with torch")
    plain = lambda one: type(one) in (Tensor, nn.Parameter) and one.layout == torch.strided and not one.is_quantized  # noqa: E731
    if odd := [name for name, value in tensors.items() if not plain(value)]:
        raise UserError(f"convert: {source}: safetensors holds only plain tensors, not sparse or quantized ones: {_some(odd)}")
    shared = _separate(tensors)
    _write(tensors, out, target, mode=path.stat().st_mode & 0o666)
    nbytes = sum(value.nbytes for value in tensors.values())
    lines = [f"wrote {target}: {len(tensors)} tensors, {nbytes / 1e6:.1f} MB"]
    if container is not None:
        rest = [name for name in found if name != container]
        lines.append(f"took {container!r}" + (f", left out {_some(rest)}" if rest else ""))
    if dropped := [name for name in held if name not in tensors]:
        lines.append(f"left out what are no tensors: {_some(dropped)}")
    lines += [f"{name} shares memory with {other}: each has values of its own now" for name, other in shared.items()]
    return lines


def run(arguments: list[str]) -> int:
    """``bigvision convert IN.pth OUT.safetensors``: says on standard output what was done."""
    usage = "bigvision convert IN.pth OUT.safetensors [--take NAME]"
    if {"-h", "--help"} & set(arguments):
        print(f"usage: {usage}\n\nRewrites pickled weights (.pth, .pt, .bin, .ckpt) as safetensors and runs no code of theirs.")
        print("--take NAME takes what a checkpoint calls so, such as teacher, in the place of averaged or plain weights.")
        return 0
    take = None
    if len(arguments) == 4 and arguments[2] == "--take":
        *arguments, _, take = arguments
    if len(arguments) != 2 or any(argument.startswith("-") for argument in arguments):
        raise UserError(f"convert: name the pickled file and the one to write: {usage}")
    source, target = arguments
    print("\n".join(convert(source, target, take)))
    return 0


def _container(found: Mapping[str, Any], source: str, take: str | None) -> str | None:
    """Under which name a checkpoint has the weights; None where it is the weights itself."""
    several = [str(name) for name, value in found.items() if isinstance(value, Mapping) and _has_tensors(value)]
    if take is not None:
        if take not in several:
            raise UserError(f"convert: {source} has no weights {take!r}, only {_some(several or list(found))}")
        return take
    if known := next((name for name in CONTAINERS if name in several), None):
        return known
    if any(isinstance(value, Tensor) for value in found.values()):
        return None
    several = [name for name in several if not NO_WEIGHTS.search(name)]
    if len(several) > 1:
        words = f"take one of them, such as --take {several[0]}"
        raise UserError(f"convert: {source} has no tensors by name, only {_some(several)}; {words}")
    return several[0] if several else None


def _has_tensors(section: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) or (isinstance(value, Mapping) and _has_tensors(value)) for value in section.values())


def _flat(section: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The entries of *section* and of the sections in it that hold tensors, by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        inner = isinstance(value, Mapping) and _has_tensors(value)
        flat |= _flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return flat


def _load(path: Path, source: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"convert: {source} is not a file; check the path")
    if path.suffix.lower() == ".safetensors":
        raise UserError(f"convert: {source} is not pickled; set model.weights to it as it is")
    with torch.serialization.safe_globals([*PLAIN, *_numpy_types()]):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            words = f"cannot be read without running its code: {_reason(path, error)}"
            if (kind := file_kind(path)) and kind != PICKLE:
                words = f"is {kind}"
            raise UserError(f"convert: {source} {words}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"convert: {source} holds a {type(found).__name__}, not weights by name; take them out with torch")
    return dict(found)


def _numpy_types() -> list[Any]:
    """What a pickled number or array of numpy is made of: data, and no code."""
    multiarray = np.empty(0).__reduce__()[0].__module__
    kinds = {type(np.dtype(kind)) for kind in "?bhilqBHILQefdgFDGUS"}
    module = sys.modules[multiarray]
    # Written by another numpy, the same function has another path.
    names = [(getattr(module, name), f"{path}.{name}") for name in ("scalar", "_reconstruct")
             for path in ("numpy.core.multiarray", "numpy._core.multiarray")]  # fmt: skip
    return [np.dtype, np.ndarray, *kinds, *names]


def _reason(path: Path, error: Exception) -> str:
    try:
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(path):
            return f"it asks for {_some(sorted(names))}"
    except Exception:
        pass
    text = str(error) or type(error).__name__
    told = re.search(r"WeightsUnpickler error: (.+)", text)
    # What follows the first sentence is torch's advice to run the file's code.
    return re.split(r"\. |\n", told[1] if told else text)[0]


def _separate(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Give every tensor contiguous memory that is its alone; return the names that shared, each with the first to do so."""
    owners: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, value in tensors.items():
        value = value.detach().resolve_conj().resolve_neg()
        owner = owners.setdefault(value.untyped_storage().data_ptr(), name) if value.numel() else name
        if owner != name:
            shared[name] = owner
        # A window on a larger storage would be written with all of it.
        alone = owner == name and value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        tensors[name] = value if alone else value.clone(memory_format=torch.contiguous_format)
    return shared


def _write(tensors: dict[str, Tensor], out: Path, target: str, mode: int) -> None:
    """The whole file or none, to be read by whom could read the one before."""
    unfinished = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
        unfinished.chmod(mode)
        unfinished.rename(out)
    except Exception as error:
        raise UserError(f"convert: {target} cannot be written: {first_line(error)}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return " ".join(", ".join(map(str, names[:4] or ["nothing"])).split()) + more
