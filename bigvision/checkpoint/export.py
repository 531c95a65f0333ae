"""A checkpoint's weights as a file or folder that other tools open, one piece of a tensor in memory at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bigvision.checkpoint import manifest
from bigvision.checkpoint.disk import FOLDER_MODE, open_new, sync_folder
from bigvision.checkpoint.layout import FileLayout, TensorSpec, index, lay_out
from bigvision.checkpoint.manifest import Damaged, ReadError
from bigvision.checkpoint.reader import Tensors
from bigvision.checkpoint.retention import check_step_folder
from bigvision.errors import UserError
from bigvision.fragments import TYPES, Place

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_SIZE = 5 * 1000**3
SUFFIX = ".safetensors"
FOREIGN = (".pt", ".pth", ".bin", ".ckpt", ".npz", ".onnx")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    files: list[str]
    """Of weights, in a folder."""
    bytes: int
    tensors: int
    architecture: str
    """timm's name of the model."""
    model_args: dict[str, Any]
    """With which timm makes it."""


def export(
    source: Path,
    target: Path,
    *,
    ema: bool = False,
    dtype: str | None = None,
    shard_size: int | None = None,
    force: bool = False,
) -> Exported:  # fmt: skip
    """Write the weights of the step folder *source* to *target*, whole or not at all.

    A *target* that ends with ".safetensors" becomes one file; any other a folder with config.json, timm's model card, and
    model.safetensors, or several files and their index. What is written depends on the values alone, not on how the
    checkpoint was laid out or under which strategy it was written.

    Args:
        ema: take the averaged weights; what has no average (buffers) comes from the model.
        dtype: "fp32", "bf16" or "fp16" for every floating-point tensor; None leaves each as it is.
        shard_size: largest size of a file's data in bytes, in a folder; None is 5 GB.
        force: replace a file, or a folder that holds nothing but an export.

    Raises:
        UserError: *source* is damaged, has no EMA or a value that *dtype* cannot hold, or *target* cannot be written.
    """
    single = target.name.endswith(SUFFIX)
    if single and shard_size is not None:
        raise UserError(f"--shard-size: {target} is one file: name a folder, or leave --shard-size out")
    check_step_folder(source)
    _check_target(target, single, force)
    try:
        tensors = Tensors(source, ("model", "ema") if ema else ("model",))
        card_text = tensors.document("config.json")
        card = _card(card_text)
        places = _places(tensors, ema, source)
        specs = [TensorSpec(name, _type(place, dtype), place.shape) for name, place in places.items()]
        whole = sum(spec.nbytes for spec in specs) + 1
        layouts = lay_out("model", specs, whole if single else shard_size or SHARD_SIZE)
        with _replacing(target, single, force) as unfinished:
            for layout in layouts:
                with _create(unfinished if single else unfinished / layout.name) as file:
                    _write(file, layout, tensors, places, {spec.name: spec.dtype for spec in specs})
            if not single:
                with _create(unfinished / "config.json") as file:
                    file.write(card_text)
                if len(layouts) > 1:
                    with _create(unfinished / "model.safetensors.index.json") as file:
                        file.write((json.dumps(index(layouts), indent=2) + "\n").encode())
                sync_folder(unfinished)
    except Damaged as error:
        raise UserError(f"export: {source} is not a valid checkpoint: {error}") from None
    except ReadError as error:
        raise UserError(f"export: {error}") from None
    except OSError as error:
        raise UserError(f"export: {target} cannot be written ({error.strerror})") from None
    size = sum(layout.size for layout in layouts)
    return Exported([layout.name for layout in layouts], size, len(specs), **card)


def _check_target(target: Path, single: bool, force: bool) -> None:
    if target.suffix in FOREIGN:
        raise UserError(f"export: {target}: only safetensors is written: end the name with {SUFFIX}, or name a folder")
    if target.is_symlink():
        raise UserError(f"export: {target} is a link: name the place itself")
    if not target.absolute().parent.is_dir():
        raise UserError(f"export: {target}: there is no folder {target.absolute().parent}: make it first")
    if all((target.parent / name).exists() for name in (manifest.NAME, "progress.json")):
        raise UserError(f"export: {target} lies in a checkpoint: name another place")
    if not target.exists() or (not single and target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise UserError(f"export: {target} is there already: use --force to replace it, or name another")
    if not (target.is_file() if single else target.is_dir()):
        raise UserError(f"export: {target} is not a {'file' if single else 'folder'}: name another")
    if not single and (foreign := sorted(entry.name for entry in target.iterdir() if not _is_exported(entry))):
        raise UserError(f"export: {target} holds {foreign[0]}, which is no part of an export: name another, or move it away")


def _is_exported(entry: Path) -> bool:
    weights = entry.name.startswith("model") and entry.name.endswith((SUFFIX, f"{SUFFIX}.index.json"))
    return entry.is_file() and (weights or entry.name == "config.json")


def _card(text: bytes) -> dict[str, Any]:
    try:
        card = json.loads(text)
        return {"architecture": str(card["architecture"]), "model_args": dict(card.get("model_args", {}))}
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"config.json is no model card of timm's: {error}") from None


def _places(tensors: Tensors, ema: bool, source: Path) -> dict[str, Place]:
    """Where the values of each of the model's tensors are taken from."""
    model, averaged = tensors.places.get("model", {}), tensors.places.get("ema", {})
    if not model:
        raise Damaged("it has no model files")
    if ema and not averaged:
        raise UserError(f"--ema: {source} has no averaged weights, its run had no optim.ema: leave --ema out")
    for name, place in averaged.items():
        if name not in model or model[name].shape != place.shape:
            raise Damaged(f"{place.file} has {name} {list(place.shape)}, which is not the model's")
    return model | averaged


def _type(place: Place, dtype: str | None) -> torch.dtype:
    own = TYPES[place.dtype]
    return PRECISIONS[dtype] if dtype and own.is_floating_point else own


def _write(
    file: BinaryIO, layout: FileLayout, tensors: Tensors, places: dict[str, Place], types: dict[str, torch.dtype]
) -> None:  # fmt: skip
    file.write(layout.header)
    for name, offset in layout.offsets.items():
        if file.tell() != offset:
            raise RuntimeError(f"{name} would lie at {file.tell()}, not at {offset}")
        for piece in tensors.pieces(places[name]):
            values = piece.to(types[name])
            if values.dtype != piece.dtype and not torch.equal(values.isfinite(), piece.isfinite()):
                largest = float(piece[piece.isfinite()].abs().max())
                raise UserError(f"--dtype: {name} has the value {largest:g}, which {values.dtype} cannot hold: use another")
            file.write(memoryview(values.view(torch.uint8).numpy()))  # pyright: ignore[reportArgumentType]


@contextmanager
def _create(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the disk when the block ends."""
    with os.fdopen(open_new(path), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _replacing(target: Path, single: bool, force: bool) -> Iterator[Path]:
    """A path beside *target* to write to, which takes its place when the block ends; nothing is left of it on an error."""
    suffix = secrets.token_hex(4)
    unfinished, aside = (target.with_name(f"{target.name}.{kind}-{suffix}") for kind in ("tmp", "aside"))
    try:
        if not single:
            unfinished.mkdir(FOLDER_MODE)
        yield unfinished
        # Again: hours may have gone by.
        _check_target(target, single, force)
        if target.is_dir():
            target.rename(aside)
        try:
            unfinished.rename(target)
        except OSError:
            if aside.exists():
                aside.rename(target)
            raise
    except BaseException:
        if single:
            unfinished.unlink(missing_ok=True)
        else:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync_folder(target.absolute().parent)
    shutil.rmtree(aside, ignore_errors=True)
