"""Models that are the caller's own: a module with its values, or a function that builds one."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bigvision.config import ModelConfig
from bigvision.errors import UserError, nearest, one_line
from bigvision.models.exact_init import Attribute, NotRecordable, named_tensors, plain_attributes

GivenModel = nn.Module | Callable[..., nn.Module]
"""A module, whose values are the first ones, or a function (or class) that builds one."""
PREFIX = "python:"
"""Before the name of such a model in a configuration, where no timm model has it."""


def given_name(model: GivenModel) -> str:
    """What a configuration calls it: ``python:Net``."""
    named = type(model) if isinstance(model, nn.Module) else model
    return PREFIX + getattr(named, "__name__", type(named).__name__)


def check_given(config: ModelConfig, model: GivenModel) -> None:
    """Raise `UserError` for what is no model, and for keys that only a timm model answers to."""
    if not isinstance(model, nn.Module) and not callable(model):
        raise UserError(f"model: {type(model).__name__} is no model: give a timm name, a module, or a function that builds one")
    kind = type(model).__module__ if isinstance(model, nn.Module) else ""
    if kind.startswith(("torch.nn.parallel", "torch.distributed", "deepspeed")):
        raise UserError(f"model: {type(model).__name__} is wrapped already: give the plain module")
    ours = {"model.pretrained": config.pretrained, "model.weights": config.weights, "model.drop_path": config.drop_path}
    for key, value in ours.items():
        if value:
            raise UserError(f"{key}: {value}, but the model is your own: load or set it there, and leave this out")
    if isinstance(model, nn.Module) and config.options:
        raise UserError(f"model.options: {next(iter(config.options))}, but the model is built already: leave them out")


def call_arguments(config: ModelConfig, num_classes: int, function: Callable[..., nn.Module]) -> dict[str, Any]:
    """What *function* is called with: ``model.options``, and ``num_classes`` where it takes that.

    Raises:
        UserError: an option that it does not take.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {**config.options}
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    for option in config.options:
        if option not in parameters and not open_ended:
            raise UserError(f"model.options.{option}: {given_name(function)} takes none{nearest(option, parameters)}")
    wanted = {"num_classes": num_classes} if "num_classes" in parameters or open_ended else {}
    return {**wanted, **config.options}


def built(config: ModelConfig, made: Any) -> nn.Module:
    """*made*, where it is a module."""
    if not isinstance(made, nn.Module):
        raise UserError(f"model: {config.name} returned {type(made).__name__}, not a module")
    return made


def failed(config: ModelConfig, error: Exception) -> UserError:
    """The `UserError` for a function that raised *error*."""
    return UserError(f"model: {config.name} cannot be built ({type(error).__name__}: {one_line(error)})")


def on_meta(module: nn.Module) -> tuple[nn.Module, list[Attribute]]:
    """A copy of *module* without memory, and its plain tensor attributes. *module* is left as it is.

    Raises:
        UserError: it is not in fp32, or holds tensors that cannot be followed.
    """
    # deepcopy takes what it finds in here for the copies.
    memo: dict[int, Any] = {}
    for name, tensor in named_tensors(module):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UserError(f"model: {name} is {str(tensor.dtype).removeprefix('torch.')}: give it in fp32, as model.float()")
        meta = tensor.detach().to("meta")
        memo.setdefault(id(tensor), nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta)
    try:
        twin = copy.deepcopy(module, memo)
        return twin, plain_attributes(twin, None, {tensor.untyped_storage()._cdata for _, tensor in named_tensors(twin)})
    except (NotRecordable, RuntimeError, TypeError) as error:
        raise UserError(f"model: {given_name(module)} cannot be copied ({one_line(error)}); give a function instead") from error


def outputs_of(config: ModelConfig, module: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """How many outputs *module* (on meta) has for images of *shape*; None where it cannot be run there.

    Raises:
        UserError: it cannot take the images, or returns something else than one vector for each.
    """
    twin = copy.deepcopy(module).eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = twin(torch.empty(2, *shape, device="meta"))
    except NotImplementedError:
        return None
    except Exception as error:
        if "meta" in str(error):
            return None
        words = f"{config.name} cannot take images of {' x '.join(map(str, shape))} ({one_line(error)})"
        raise UserError(f"model.image_size: {words}; try another size") from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 2:
        what = f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(f"model: {config.name} returned {what} for 2 images: a classifier returns a tensor (2, classes)")
    return outputs.shape[1]


def given_card(name: str, outputs: int | None, shape: tuple[int, int, int], **normalised: Any) -> dict[str, Any]:
    """config.json of its checkpoints: what is known, and that timm cannot build it."""
    return {
        "architecture": name,
        "num_classes": outputs,
        "pretrained_cfg": {"input_size": list(shape), **normalised},
        "note": "This model was given from Python and is none of timm's: load model.safetensors into your own module.",
    }
