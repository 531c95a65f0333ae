"""What is asked of timm or of the user's own model: names, options, sizes, checked before anything is built."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, is_model, split_model_name_tag
from torch import Tensor, nn

from bigvision.config import ModelConfig
from bigvision.errors import UserError, either, nearest, one_line
from bigvision.models.exact_init import Attribute, NotRecordable, named_tensors, plain_attributes
from bigvision.models.weights_file import WeightsFile

GivenModel = nn.Module | Callable[..., nn.Module]
"""A module, whose values are the first ones, or a function (or class) that builds one."""
PREFIX = "python:"
"""Before the name of such a model in a configuration, where no timm model has it."""
KEYS = {"img_size": "model.image_size", "drop_path_rate": "model.drop_path", "num_classes": "model.num_classes"}
RESERVED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}
RESERVED |= {"device", "dtype", "pretrained_model_args"}
HUB = ("hf-hub:timm/", "hf_hub:timm/", "timm/")
"""Before the name of timm's repositories in the Hugging Face hub, which are called NAME.TAG."""


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


def check_model(config: ModelConfig, model: GivenModel | None = None) -> None:
    """Raise `UserError` for an unknown model name or a weights file that cannot be read. Builds nothing, reads only headers."""
    name, _ = current_name(config.name)
    if model is not None:
        check_given(config, model)
    else:
        check_name(name)
    if config.weights is not None and config.pretrained:
        raise UserError(f"model.weights: {config.weights} and model.pretrained: true exclude each other; keep one")
    if config.weights is not None:
        WeightsFile(config.weights, "model.weights")
    elif config.pretrained:
        architecture, _ = split_model_name_tag(name)
        if not any(card.has_weights for card in get_arch_pretrained_cfgs(architecture).values()):
            raise UserError(f"model.pretrained: timm has no weights for {name}; use false")
    if (size := image_size(config)) is not None and min(size) < 1:
        raise UserError(f"model.image_size: {config.image_size} is not a size in pixels; give a positive number, or two")
    if not 0.0 <= config.drop_path < 1.0:
        raise UserError(f"model.drop_path: {config.drop_path} is not a rate; give a number from 0 up to 1")


def current_name(name: str) -> tuple[str, str | None]:
    """timm's name for the model *name*, which may be an older one or that of timm's repository, and a line that says so."""
    plain = next((rest for prefix in HUB if (rest := name.removeprefix(prefix)) != name and "." in rest), name)
    plain = timm.models.get_deprecated_models().get(plain) or plain
    return plain, None if plain == name else f"model.name: {name} is called {plain} in timm {timm.__version__}"


def check_name(name: str) -> None:
    """Raise `UserError` unless `name` is one of timm's (`current_name`), with or without a weights tag."""
    if name.startswith(PREFIX):
        raise UserError(
            f"model.name: the model of this run was given from Python ({name.removeprefix(PREFIX)}): give it again, with "
            "bigvision.train(..., model=...); no command can build it"
        )
    if name.startswith(("local-dir:", "local_dir:")):
        folder = name.partition(":")[2]
        raise UserError(f"model.name: {name}: write {_architecture(folder)} there, and model.weights: {folder}")
    if name.startswith(("hf-hub:", "hf_hub:")) or "/" in name:
        raise UserError(
            f"model.name: {name!r} is not one of timm's repositories (hf-hub:timm/NAME.TAG): write the timm name that its "
            "config.json gives as architecture, download its model.safetensors, and name that in model.weights"
        )
    architecture, tag = split_model_name_tag(name)
    if ":" in name or not is_model(architecture):
        known = timm.list_models()
        hint = f"; did you mean {name.lower()!r}?" if is_model(architecture.lower()) else nearest(architecture.lower(), known)
        raise UserError(f"model.name: {name!r} is not a timm model{hint}")
    tags = [f"{architecture}.{card.tag}" for card in get_arch_pretrained_cfgs(architecture).values() if card.tag]
    if tag and f"{architecture}.{tag}" not in tags:
        if not tags:
            raise UserError(f"model.name: timm has no weights {name!r}; use {architecture!r}")
        close = difflib.get_close_matches(name, tags, n=4, cutoff=0.0)
        more = f" ({len(tags)} in all)" if len(tags) > len(close) else ""
        raise UserError(f"model.name: timm has no weights {name!r}; did you mean {either([repr(one) for one in close])}?{more}")


def _architecture(folder: str) -> str:
    """What the model card in *folder* says, in words where there is none."""
    try:
        found = json.loads(Path(folder, "config.json").expanduser().read_bytes())["architecture"]
    except (OSError, ValueError, KeyError, TypeError):
        return "the architecture of its config.json"
    return str(found) if is_model(str(found)) else "the architecture of its config.json"
