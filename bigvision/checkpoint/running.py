"""The model of a checkpoint in one process, and what was exported beside it: both run on the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bigvision.config import load_config
from bigvision.errors import UserError, one_line
from bigvision.models import Blueprint, blueprint
from bigvision.tasks import PREFIX, build_task

IMAGES = 3
"""That are run: a number that no export is made with."""
TOLERANCE = 1e-4
"""Largest difference of outputs, as a share of the largest output: those of a fresh head are small."""
Parts = Callable[[str], Iterator[Tensor]]
"""The values of a tensor by its name, flat and in parts."""


class Unknown(Exception):
    """bigvision cannot build the model of a checkpoint; the text says why."""


def plan_model(progress: Mapping[str, Any], outputs: int | None, adapters: bool) -> tuple[Blueprint, bool]:
    """The model of a run, on meta, and whether it is timm's alone.

    *progress* is progress.json of the checkpoint, *outputs* those of the classifier; *adapters*: with those of ``model.lora``.
    Raises `Unknown`.
    """
    try:
        saved = progress["config"]
        # All values come from the checkpoint; the files that the run began with may be gone.
        model = {**saved["model"], "pretrained": False, "weights": None}
        config = load_config({"model": model, "task": saved.get("task"), "out": "unused"})
        own = config.task.name.startswith(PREFIX)
        around = None if own else build_task(config.task).model(config)
        named = config.model if adapters else replace(config.model, lora=None)
        return blueprint(named, outputs, around=around), around is None
    except (KeyError, TypeError):
        raise Unknown("its progress.json does not say which model it is of") from None
    except UserError as error:
        raise Unknown(str(error)) from None


@torch.no_grad()
def filled(plan: Blueprint, names: set[str], parts: Parts, dtype: torch.dtype | None = None) -> nn.Module:
    """The planned model on the CPU, for evaluation, with the values of a checkpoint that has the tensors *names*.

    *dtype*: floating-point values are rounded to it first. Raises `Unknown` where the checkpoint has other tensors.
    """
    module = plan.module
    every = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    # Tied names lose each other on the way to the CPU; the checkpoint has one of them.
    saved = {tensor: name for name, tensor in every if name in names}
    sources = {name: saved.get(tensor) for name, tensor in every}
    kept = module.state_dict().keys()
    if strange := sorted(names - sources.keys()) or sorted(name for name in kept if sources[name] is None):
        raise Unknown(f"{strange[0]} is in one of the two only, the checkpoint or the model that its configuration gives")
    module.to_empty(device="cpu").eval().requires_grad_(False)
    tensors = dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
    for name, source in sources.items():
        if source is not None:
            value = torch.cat(list(parts(source)))
            if dtype is not None and value.is_floating_point():
                value = value.to(dtype)
            tensors[name].copy_(value.view(tensors[name].shape))
    for name, value in plan.tensors(0, {name for name, source in sources.items() if source is None}):
        tensors[name].copy_(value)
    plan.fill_attributes(module, "cpu")
    return module


def random_images(shape: tuple[int, int, int], count: int = IMAGES) -> Tensor:
    """Normalised images, the same at each call."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(module: nn.Module, images: Tensor) -> list[Tensor]:
    """What *module* returns in evaluation, its tensors in order."""
    return [leaf for leaf in tree_leaves(module.eval()(images)) if isinstance(leaf, Tensor)]


def open_with_timm(path: Path, files: list[str], card: Mapping[str, Any]) -> nn.Module:
    """The model in an exported file, or in a folder whose weights are *files*."""
    name, arguments = card["architecture"], card.get("model_args", {})
    if path.is_file():
        return timm.create_model(name, checkpoint_path=str(path), **arguments)
    if len(files) == 1:
        return timm.create_model(f"local-dir:{path}", pretrained=True)
    import accelerate

    module = timm.create_model(name, **{"num_classes": card["num_classes"], **arguments})
    accelerate.load_checkpoint_in_model(module, str(path))
    return module


def compare(expected: list[Tensor], run: Callable[[], list[Tensor]], what: str) -> str:
    """Run what was exported and return the largest difference from *expected*, in words; `UserError` where that is too large.

    *what* opens it.
    """
    try:
        found = run()
    except Exception as error:
        raise UserError(f"export: {what} cannot run what was exported ({one_line(error):.300}), so nothing was kept") from error
    if [one.shape for one in found] != [one.shape for one in expected]:
        shapes = " and ".join(str([tuple(one.shape) for one in side]) for side in (found, expected))
        raise UserError(f"export: {what} gives outputs of other shapes than the checkpoint's model, {shapes}: nothing was kept")
    largest = max((_largest(one.float()[one.isfinite()].abs()) for one in expected), default=0.0)
    difference = max((_difference(a, b) for a, b in zip(found, expected)), default=0.0)
    if not difference <= TOLERANCE * largest:
        raise UserError(
            f"export: {what} gives other outputs than the checkpoint's model: they differ by {difference:.3g}, with outputs up "
            f"to {largest:.3g}, so nothing was kept"
        )
    return (
        f"{what} gives the outputs of the checkpoint's model on {IMAGES} random images: largest difference {difference:.2g}, "
        f"outputs up to {largest:.3g}"
    )


def _difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference; NaN where only one is not finite."""
    alike = (found == expected) | (found.isnan() & expected.isnan())
    return _largest((found.double() - expected.double()).abs()[~alike])


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
