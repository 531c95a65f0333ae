"""The keyword arguments for ``timm.create_model``, and whose fault it is when timm refuses them."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

from bigvision.config import ModelConfig
from bigvision.errors import UserError, nearest, one_line

KEYS = {"img_size": "model.image_size", "drop_path_rate": "model.drop_path", "num_classes": "model.num_classes"}
RESERVED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}
RESERVED |= {"device", "dtype", "pretrained_model_args"}


def image_size(config: ModelConfig) -> tuple[int, int] | None:
    """``model.image_size`` as height and width."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else size


def create_arguments(config: ModelConfig, num_classes: int) -> dict[str, Any]:
    """What the configuration asks for. Raises `UserError` for an option that has a key of its own or is not ours to pass."""
    for option in config.options:
        if option in KEYS:
            raise UserError(f"model.options.{option}: has a key of its own; write {KEYS[option]} instead")
        if option in RESERVED:
            raise UserError(f"model.options.{option}: is not an option of the architecture; remove it")
    arguments: dict[str, Any] = {"pretrained": config.weights is not None or config.pretrained, "num_classes": num_classes}
    if (size := image_size(config)) is not None:
        # Of a square the side: some constructors take no pair.
        arguments["img_size"] = size[0] if size[0] == size[1] else size
    # Also when it is 0: some of timm's constructors have another default.
    arguments["drop_path_rate"] = config.drop_path
    return {**arguments, **config.options}


def accepted(
    config: ModelConfig, num_classes: int, build: Callable[[dict[str, Any]], nn.Module]
) -> tuple[nn.Module, dict[str, Any]]:
    """`build` the model and return it with the arguments it took.

    ``img_size`` is offered to every model and taken back from those without such an argument: they take any size. So is a
    ``drop_path_rate`` of 0. Raises `UserError` for the other arguments that the constructor does not know; lets every other
    exception through.
    """
    arguments = create_arguments(config, num_classes)
    while True:
        try:
            return build(arguments), arguments
        except TypeError as error:
            _, unexpected, names = str(error).partition("unexpected keyword argument")
            unknown = [name for name in re.findall(r"'(\w+)'", names) if name in arguments] if unexpected else []
            if not unknown:
                raise
            for name in unknown:
                if name != "img_size" and not (name == "drop_path_rate" and config.drop_path == 0):
                    raise _refused(config, arguments, name) from None
            arguments = _without(arguments, *unknown)


def _refused(config: ModelConfig, arguments: dict[str, Any], name: str) -> UserError:
    if name == "drop_path_rate":
        return UserError(f"model.drop_path: {config.name} has no stochastic depth to set to {config.drop_path}; use 0.0")
    known: list[str] = []
    module = _on_meta(config.name, {key: value for key, value in arguments.items() if key not in config.options})
    if module is not None:
        known = list(inspect.signature(type(module).__init__).parameters)
    return UserError(f"model.options.{name}: {config.name} has no such option{nearest(name, known) or '; remove it'}")


def blame(config: ModelConfig, num_classes: int, error: Exception) -> UserError:
    """The `UserError` for a constructor that raised `error`: the key without which the model can be built."""
    arguments = create_arguments(config, num_classes)
    reason = (str(error) or type(error).__name__).splitlines()[0]
    if "img_size" in arguments and _on_meta(config.name, _without(arguments, "img_size")) is not None:
        height, width = image_size(config) or (0, 0)
        return UserError(f"model.image_size: {config.name} cannot take {height} x {width} pixels ({reason}); try another size")
    for option, value in config.options.items():
        if _on_meta(config.name, _without(arguments, option)) is not None:
            return UserError(f"model.options.{option}: {config.name} cannot be built with {value!r} ({reason}); change it")
    if config.options and _on_meta(config.name, _without(arguments, *config.options)) is not None:
        return UserError(f"model.options: {config.name} cannot be built with {config.options} ({reason}); change them")
    return UserError(f"model.name: timm cannot build {config.name} ({reason}); choose another model")


def check_outputs(config: ModelConfig, num_classes: int, module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise `UserError` where *module*, on meta, returns no class scores for images of *shape* because of ``model.options``."""
    if not config.options or not (wrong := _wrong_outputs(module, num_classes, shape)):
        return
    arguments = create_arguments(config, num_classes)
    for option, value in config.options.items():
        other = _on_meta(config.name, _without(arguments, option))
        if other is not None and not _wrong_outputs(other, num_classes, shape):
            raise UserError(f"model.options.{option}: with {value!r} {config.name} {wrong}; change it")
    other = _on_meta(config.name, _without(arguments, *config.options))
    if other is not None and not _wrong_outputs(other, num_classes, shape):
        raise UserError(f"model.options: with {config.options} {config.name} {wrong}; change them")


def _wrong_outputs(module: nn.Module, num_classes: int, shape: tuple[int, int, int]) -> str:
    """What is wrong with what *module* returns in evaluation or training; "" where nothing is, or meta cannot tell."""
    for training in (False, True):
        twin = copy.deepcopy(module).train(training)  # some models keep what they compute
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                outputs = twin(torch.empty(2, *shape, device="meta"))
        except NotImplementedError:
            return ""
        except Exception as error:
            return "" if "meta" in str(error) else f"cannot take images of {' x '.join(map(str, shape))} ({one_line(error)})"
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if found != (2, num_classes):
            mode = "in training " if training else ""
            return f"returns {found} for 2 images {mode}instead of scores (2, {num_classes})"
    return ""


def _without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in names}


def _on_meta(name: str, arguments: dict[str, Any]) -> nn.Module | None:
    arguments = dict(arguments, pretrained=False)
    for missing in ((), ("img_size",), ("drop_path_rate",), ("img_size", "drop_path_rate")):
        attempt = _without(arguments, *missing)
        try:
            with torch.device("meta"):
                return timm.create_model(name, **attempt)
        except Exception:
            continue
    return None
