"""A checkpoint's weights as a file or folder that other tools open: written, run, and then given its name."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bigvision.checkpoint import manifest, running
from bigvision.checkpoint.adapters import find_adapters
from bigvision.checkpoint.forms import (
    MARK,
    ONNX_FILE_LIMIT,
    check_onnx,
    hub_config,
    onnx_facts,
    readme,
    run_onnx,
    write_onnx,
)  # fmt: skip
from bigvision.checkpoint.manifest import Damaged, ReadError, read_document, read_file
from bigvision.checkpoint.reader import Tensors
from bigvision.checkpoint.retention import check_step_folder
from bigvision.checkpoint.writer import FileLayout, index, lay_out
from bigvision.disk import FOLDER_MODE, open_new, publish, remove, sync_folder, write_new
from bigvision.errors import UserError
from bigvision.fragments import TYPES, Place, bytes_of
from bigvision.models import Blueprint

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_SIZE = 5 * 1000**3
SUFFIX = ".safetensors"
ONNX = ".onnx"
FOREIGN = (".pt", ".pth", ".bin", ".ckpt", ".npz")
Form = Literal["timm", "hf", "onnx"]
"""What opens an export."""


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
    checked: str
    """What came of running it, or why it was not run."""


class Step:
    """The model in a step folder, as it is to be exported; opening it reads no tensor of the model."""

    def __init__(self, source: Path, ema: bool, alone: bool, dtype: str | None) -> None:
        """*ema*: the averaged weights; *alone*: of adapters only those; *dtype*: what floating-point tensors are written in."""
        self.tensors = Tensors(source, ("model", "ema") if ema else ("model",))
        self.text = read_file(source, self.tensors.ranges, "config.json")
        self.card = _card(self.text)
        self.progress = read_document(source, self.tensors.ranges, "progress.json")
        self.ema, self.alone, self.dtype = ema, alone, None if dtype is None else PRECISIONS[dtype]
        self.saved = _places(self.tensors, ema, source)
        """All that the model has, adapters too."""
        self.adapters = find_adapters(self.tensors, self.saved)
        self.places, self.merged = self.saved, dict[str, str]()
        """What is written, and those weights that get the adapter of a layer."""
        if alone and self.adapters is None:
            raise UserError(f"--adapter: {source} has no adapters, its run had no model.lora: leave --adapter out")
        if self.adapters is not None and alone:
            self.text = f"{json.dumps(self.adapters.peft_config(), indent=2)}\n".encode()
            self.places = self.adapters.alone()
        elif self.adapters is not None:
            self.places, self.merged = self.adapters.base(), {f"{layer}.weight": layer for layer in self.adapters.layers}

    def parts(self, name: str) -> Iterator[torch.Tensor]:
        """The values of one of `places`, flat and in parts."""
        if self.adapters and name in self.merged:
            return self.adapters.merged(self.merged[name])
        return self.tensors.parts(self.places[name])

    def unmerged(self, name: str) -> Iterator[torch.Tensor]:
        """Those of one of `saved`."""
        return self.tensors.parts(self.saved[name])

    def written(self) -> dict[str, torch.Tensor]:
        """The shapes and types of what is written, on meta."""
        kinds = {name: torch.float32 if name in self.merged else TYPES[place.dtype] for name, place in self.places.items()}
        if self.dtype is not None:
            kinds = {name: self.dtype if kind.is_floating_point else kind for name, kind in kinds.items()}
        return {name: torch.empty(self.places[name].shape, dtype=kind, device="meta") for name, kind in kinds.items()}

    @property
    def weights(self) -> str:
        """What the weights are, for people."""
        kind = "moving average (EMA)" if self.ema else "as trained"
        kind += ", adapters (LoRA) merged" if self.adapters else ""
        return kind if self.dtype is None else f"{kind}, rounded to {str(self.dtype).removeprefix('torch.')}"


def export(
    source: Path, target: Path, *, form: Form = "timm", ema: bool = False, dtype: str | None = None,
    shard_size: int | None = None, force: bool = False, adapter: bool = False, check: bool = True,
) -> Exported:  # fmt: skip
    """Write the weights of the step folder *source* to *target*, whole or not at all.

    A *target* that ends with ".safetensors" becomes one file; any other a folder with config.json, timm's model card, and
    model.safetensors, or several files and their index. What is written depends on the values alone, not on how the
    checkpoint was laid out or under which strategy it was written. Adapters (LoRA) are merged into the weights.

    Args:
        form: "timm"; "hf", a folder as timm's on the Hugging Face hub; "onnx", one file that ends with ".onnx", or a folder
            with model.onnx, its weights beside it, and config.json.
        ema: take the averaged weights; what has no average (buffers) comes from the model.
        dtype: "fp32", "bf16" or "fp16" for every floating-point tensor; None leaves each as it is.
        shard_size: largest size of a file's data in bytes, in a folder; None is 5 GB.
        force: replace a file, or a folder that holds nothing but an export.
        adapter: write the adapters alone, and what was trained beside them, as the folder that peft opens.
        check: before what was written takes its name, run it and the checkpoint's model on the same images. Each is in memory.

    Raises:
        UserError: *source* is damaged, has no EMA, no adapters or a value that *dtype* cannot hold, *target* cannot be
            written, or what was written does not run or gives other outputs.
    """
    single = target.suffix in (SUFFIX, ONNX)
    _check_flags(target, form, single, dtype, shard_size, adapter)
    check_step_folder(source)
    _check_target(target, single, force)
    if form == "onnx":
        check_onnx()
    # timm knows a file by the end of its name.
    name, ending = (target.stem, target.suffix) if single else (target.name, "")
    unfinished = target.with_name(f"{name}.tmp-{secrets.token_hex(4)}{ending}")
    try:
        step = Step(source, ema, adapter, dtype)
        try:
            if not single:
                unfinished.mkdir(FOLDER_MODE)
            if form == "onnx":
                files, size = _write_graph(step, unfinished, single)
            else:
                files, size = _write_weights(step, unfinished, single, shard_size, form)
            checked = _run(step, unfinished, form, files) if check else "no: --no-check"
            if not single:
                sync_folder(unfinished)
            # Again: hours may have gone by.
            _check_target(target, single, force)
            publish(unfinished, target)
        except BaseException:
            with suppress(OSError):
                remove(unfinished)
            raise
    except running.Unknown as reason:
        raise UserError(f"--format {form}: the model cannot be built: {reason}") from None
    except Damaged as error:
        raise UserError(f"export: {source} is not a valid checkpoint: {error}") from None
    except ReadError as error:
        raise UserError(f"export: {error}") from None
    except OSError as error:
        raise UserError(f"export: {target} cannot be written ({error.strerror})") from None
    arguments = dict(step.card.get("model_args", {}))
    return Exported(files, size, len(step.places), step.card["architecture"], arguments, checked)


def _write_weights(step: Step, unfinished: Path, single: bool, shard_size: int | None, form: Form) -> tuple[list[str], int]:
    """Write safetensors files, in a folder with what belongs to them; returns their names and the bytes in them."""
    if form == "hf":
        _plan(step, form, adapters=False)
    written = step.written()
    one_file = sum(tensor.nbytes for tensor in written.values()) + 1
    group = "adapter_model" if step.alone else "model"
    layouts = lay_out(group, written, one_file if single or step.alone else shard_size or SHARD_SIZE)
    for layout in layouts:
        _write(unfinished if single else unfinished / layout.name, layout, step.parts, written)
    if not single:
        documents = {"adapter_config.json" if step.alone else "config.json": step.text}
        if form == "hf":
            documents["config.json"] = f"{json.dumps(hub_config(step.card), indent=2)}\n".encode()
            documents["README.md"] = readme(step.card, step.progress, step.weights).encode()
        if len(layouts) > 1:
            documents["model.safetensors.index.json"] = f"{json.dumps(index(layouts), indent=2)}\n".encode()
        for name, text in documents.items():
            write_new(unfinished / name, text)
    return [layout.name for layout in layouts], sum(layout.size for layout in layouts)


def _write_graph(step: Step, unfinished: Path, single: bool) -> tuple[list[str], int]:
    """Write an ONNX graph; returns the names of its files in a folder, and the bytes in them."""
    size = sum(tensor.nbytes for tensor in step.written().values())
    if single and size > ONNX_FILE_LIMIT:
        raise UserError(
            f"--format onnx: {size} bytes of weights, but an ONNX file ends at 2 GiB: name a folder, in which they are a file"
        )
    plan = _plan(step, "onnx", adapters=False)
    module = running.filled(plan, set(step.places), step.parts)
    # Another number of images than is run: the graph must not keep it.
    images = running.random_images(plan.input_shape, running.IMAGES - 1)
    path = unfinished if single else unfinished / f"model{ONNX}"
    write_onnx(module, images, path, onnx_facts(step.card, step.progress, step.weights), beside=not single)
    files = [path] if single else sorted(unfinished.iterdir())
    size = sum(file.stat().st_size for file in files)
    if not single:
        write_new(unfinished / "config.json", step.text)
    return [file.name for file in files], size


def _plan(step: Step, form: Form, adapters: bool) -> Blueprint:
    """The model of the run, on meta; `Unknown` where the libraries that open the *form* do not have it."""
    plan, is_timms = running.plan_model(step.progress, step.card.get("num_classes"), adapters)
    if form != "onnx" and not is_timms:
        raise running.Unknown("its task builds more than timm's model")
    return plan


def _run(step: Step, unfinished: Path, form: Form, files: list[str]) -> str:
    """Run what was written and the checkpoint's model; returns what came of it, or why timm's form was not run."""
    if step.alone:
        return "no: adapters run with the weights that they were trained beside"
    try:
        live = step.adapters is not None and step.dtype is None  # what is rounded is the merged weight
        plan = _plan(step, form, live)
        images = running.random_images(plan.input_shape)
        parts, names = (step.unmerged, step.saved) if live else (step.parts, step.places)
        expected = running.outputs(running.filled(plan, set(names), parts, step.dtype), images)
    except running.Unknown as reason:
        if form != "timm":
            raise
        return f"no: {reason}"
    if form == "onnx":
        path = unfinished if unfinished.is_file() else unfinished / f"model{ONNX}"
        return running.compare(expected, lambda: run_onnx(path, images), "onnxruntime")
    return running.compare(
        expected, lambda: running.outputs(running.open_with_timm(unfinished, files, step.card), images), "timm"
    )


def _check_flags(target: Path, form: Form, single: bool, dtype: str | None, shard_size: int | None, adapter: bool) -> None:
    """Flags and names that exclude each other."""
    if form == "timm" and target.suffix == ONNX:
        raise UserError(f"export: {target}: add --format onnx, or end the name with {SUFFIX}")
    if form == "onnx" and target.suffix == SUFFIX:
        raise UserError(f"--format onnx: {target} ends with {SUFFIX}: end the name with {ONNX}, or name a folder")
    if form == "hf" and single:
        raise UserError(f"--format hf: {target} is one file, but the hub takes a folder: name one")
    if form != "timm" and adapter:
        raise UserError(f"--adapter: peft's folder is a form of its own: leave --format {form} or --adapter out")
    if form == "onnx" and dtype not in (None, "fp32"):
        raise UserError(f"--dtype: {dtype}, but an ONNX export computes in fp32: leave --dtype out")
    if form == "onnx" and shard_size is not None:
        raise UserError("--shard-size: ONNX has one file of weights: leave --shard-size out")
    if single and shard_size is not None:
        raise UserError(f"--shard-size: {target} is one file: name a folder, or leave --shard-size out")
    if adapter and single:
        raise UserError(f"--adapter: {target} is one file, but peft opens a folder: name one")
    if adapter and shard_size is not None:
        raise UserError("--shard-size: adapters are one file: leave --shard-size out")


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
    if not entry.is_file():
        return False
    if entry.name == "README.md":
        return MARK in entry.read_text(errors="replace")
    ends = (SUFFIX, f"{SUFFIX}.index.json", ONNX, f"{ONNX}.data")
    weights = entry.name.startswith("model") and entry.name.endswith(ends)
    return weights or entry.name in ("config.json", "adapter_config.json", "adapter_model.safetensors")


def _card(text: bytes) -> dict[str, Any]:
    try:
        card = json.loads(text)
        return {**card, "architecture": str(card["architecture"]), "model_args": dict(card.get("model_args", {}))}
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
