"""A checkpoint's weights as a file or folder that other tools open, one part of a tensor in memory at a time."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bigvision.checkpoint import manifest
from bigvision.checkpoint.adapters import find_adapters
from bigvision.checkpoint.manifest import Damaged, ReadError, read_file
from bigvision.checkpoint.reader import Tensors
from bigvision.checkpoint.retention import check_step_folder
from bigvision.checkpoint.writer import FileLayout, index, lay_out
from bigvision.disk import FOLDER_MODE, open_new, publish, remove, sync_folder, write_new
from bigvision.errors import UserError
from bigvision.fragments import TYPES, Place, bytes_of

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
    source: Path, target: Path, *, ema: bool = False, dtype: str | None = None, shard_size: int | None = None,
    force: bool = False, adapter: bool = False,
) -> Exported:  # fmt: skip
    """Write the weights of the step folder *source* to *target*, whole or not at all.

    A *target* that ends with ".safetensors" becomes one file; any other a folder with config.json, timm's model card, and
    model.safetensors, or several files and their index. What is written depends on the values alone, not on how the
    checkpoint was laid out or under which strategy it was written. Adapters (LoRA) are merged into the weights.

    Args:
        ema: take the averaged weights; what has no average (buffers) comes from the model.
        dtype: "fp32", "bf16" or "fp16" for every floating-point tensor; None leaves each as it is.
        shard_size: largest size of a file's data in bytes, in a folder; None is 5 GB.
        force: replace a file, or a folder that holds nothing but an export.
        adapter: write the adapters alone, and what was trained beside them, as the folder that peft opens.

    Raises:
        UserError: *source* is damaged, has no EMA, no adapters or a value that *dtype* cannot hold, or *target* cannot be
            written.
    """
    single = target.name.endswith(SUFFIX)
    if single and shard_size is not None:
        raise UserError(f"--shard-size: {target} is one file: name a folder, or leave --shard-size out")
    if adapter and single:
        raise UserError(f"--adapter: {target} is one file, but peft opens a folder: name one")
    if adapter and shard_size is not None:
        raise UserError("--shard-size: adapters are one file: leave --shard-size out")
    check_step_folder(source)
    _check_target(target, single, force)
    unfinished = target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        tensors = Tensors(source, ("model", "ema") if ema else ("model",))
        document, text = "config.json", read_file(source, tensors.ranges, "config.json")
        card = _card(text)
        places, group, merged = _places(tensors, ema, source), "model", dict[str, str]()
        adapters = find_adapters(tensors, places)
        if adapter and adapters is None:
            raise UserError(f"--adapter: {source} has no adapters, its run had no model.lora: leave --adapter out")
        if adapters is not None and adapter:
            document, text = "adapter_config.json", f"{json.dumps(adapters.peft_config(), indent=2)}\n".encode()
            places, group = adapters.alone(), "adapter_model"
        elif adapters is not None:
            places, merged = adapters.base(), {f"{layer}.weight": layer for layer in adapters.layers}

        def parts(name: str) -> Iterator[torch.Tensor]:
            return adapters.merged(merged[name]) if adapters and name in merged else tensors.parts(places[name])

        types = {name: torch.float32 if name in merged else TYPES[place.dtype] for name, place in places.items()}
        written = {name: torch.empty(place.shape, dtype=types[name], device="meta") for name, place in places.items()}
        if dtype is not None:
            written = {name: one.to(PRECISIONS[dtype]) if one.is_floating_point() else one for name, one in written.items()}
        one_file = sum(tensor.nbytes for tensor in written.values()) + 1
        layouts = lay_out(group, written, one_file if single or adapter else shard_size or SHARD_SIZE)
        try:
            if single:
                _write(unfinished, layouts[0], parts, written)
            else:
                unfinished.mkdir(FOLDER_MODE)
                for layout in layouts:
                    _write(unfinished / layout.name, layout, parts, written)
                write_new(unfinished / document, text)
                if len(layouts) > 1:
                    listed = json.dumps(index(layouts), indent=2) + "\n"
                    write_new(unfinished / "model.safetensors.index.json", listed.encode())
                sync_folder(unfinished)
            # Again: hours may have gone by.
            _check_target(target, single, force)
            publish(unfinished, target)
        except BaseException:
            with suppress(OSError):
                remove(unfinished)
            raise
    except Damaged as error:
        raise UserError(f"export: {source} is not a valid checkpoint: {error}") from None
    except ReadError as error:
        raise UserError(f"export: {error}") from None
    except OSError as error:
        raise UserError(f"export: {target} cannot be written ({error.strerror})") from None
    size = sum(layout.size for layout in layouts)
    return Exported([layout.name for layout in layouts], size, len(places), **card)


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
    return entry.is_file() and (weights or entry.name in ("config.json", "adapter_config.json", "adapter_model.safetensors"))


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
        raise UserError(f"--ema: {source} has no averaged weights, its run had no ema.decay: leave --ema out")
    for name, place in averaged.items():
        if name not in model or model[name].shape != place.shape:
            raise Damaged(f"{place.file} has {name} {list(place.shape)}, which is not the model's")
    return model | averaged


def _write(
    path: Path, layout: FileLayout, parts: Callable[[str], Iterator[torch.Tensor]], written: dict[str, torch.Tensor]
) -> None:  # fmt: skip
    with os.fdopen(open_new(path), "wb") as file:
        file.write(layout.header)
        for name, offset in layout.offsets.items():
            if file.tell() != offset:
                raise RuntimeError(f"{name} would lie at {file.tell()}, not at {offset}")
            for part in parts(name):
                values = part.to(written[name].dtype)
                if values.dtype != part.dtype and not torch.equal(values.isfinite(), part.isfinite()):
                    largest = float(part[part.isfinite()].abs().max())
                    raise UserError(f"--dtype: {name} has the value {largest:g}, which {values.dtype} cannot hold: use another")
                file.write(bytes_of(values))
        file.flush()
        os.fsync(file.fileno())
