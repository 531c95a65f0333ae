"""What is asked of timm or of the user's own model: names, options, sizes, checked before anything is built."""

from __future__ import annotations

import copy
import difflib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models import get_arch_pretrained_cfgs, is_model, split_model_name_tag
from torch import Tensor, nn

from bigvision.config import ModelConfig, Size, pair
from bigvision.errors import UserError, either, nearest, one_line
from bigvision.models.tracing import first_line
from bigvision.models.weights_file import WeightsFile

GivenModel = nn.Module | Callable[..., nn.Module]  # a module with its first values, or a function that builds one
PREFIX = "python:"  # before the name of such a model in a configuration, where no timm model has it
FLEXIBLE = "dynamic_img_size"  # timm's argument of models that else take one size of images: they fit their positions to each
KEYS = {"img_size": "model.image_size", "drop_path_rate": "model.drop_path", "num_classes": "model.num_classes"}
RESERVED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"}
RESERVED |= {"device", "dtype", "pretrained_model_args"}
HUB = ("hf-hub:timm/", "hf_hub:timm/", "timm/")  # begin timm's repositories in the Hugging Face hub: NAME.TAG follows


def given_name(model: GivenModel) -> str:
    """What a configuration calls it: ``python:Net``."""
    named = type(model) if isinstance(model, nn.Module) else model
    return PREFIX + getattr(named, "__name__", type(named).__name__)


def call_arguments(config: ModelConfig, num_classes: int, function: Callable[..., nn.Module]) -> dict[str, Any]:
    """What *function* is called with: ``model.options``, all of which it must take, and ``num_classes`` where it takes that."""
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


def outputs_of(config: ModelConfig, module: nn.Module, shape: tuple[int, int, int]) -> int | None:
    """How many outputs *module*, which must return a vector for each image, has on meta; None where it cannot be run there."""
    outputs = _outputs(module, shape)
    if isinstance(outputs, Exception):
        if _only_on_meta(outputs):
            return None
        raise UserError(f"model.image_size: {config.name} {_not_taken(shape, outputs)}; try another size") from outputs
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != 2:
        what = f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(f"model: {config.name} returned {what} for 2 images: a classifier returns a tensor (2, classes)")
    return outputs.shape[1]


def check_size(config: ModelConfig, module: nn.Module, shape: tuple[int, int, int], usual: tuple[int, ...] | None) -> None:
    """Raise `UserError` when the model cannot take images of *shape* although it takes its *usual* size, on meta."""
    if shape[1:] != tuple(getattr(module, "pretrained_cfg", {}).get("input_size", ()))[1:]:  # some of timm's own do not divide
        _check_patches("model.image_size", config.name, module, shape[1:])
    error = _outputs(module, shape, strict=True)
    if not isinstance(error, Exception):
        return
    if usual is None or not isinstance(_outputs(module, (shape[0], *usual), strict=True), Exception):
        words = f"{config.name} cannot take {shape[1]} x {shape[2]} pixels ({first_line(error)})"
        raise UserError(f"model.image_size: {words}; {_other_size(config, shape)}")


def _other_size(config: ModelConfig, shape: tuple[int, int, int]) -> str:
    """What to do about images of *shape* that the model cannot take: a square, where it takes that of one of the sides."""
    channels, height, width = shape
    for side in (height, width) if height != width else ():
        if _takes(config, (channels, side, side)):
            return f"use a square, such as {side}"
    return "try another size"


def _takes(config: ModelConfig, shape: tuple[int, int, int]) -> bool:
    """Whether timm's model can be built for images of *shape*, and takes them."""
    built = _on_meta(config.name, create_arguments(replace(config, image_size=(shape[1], shape[2])), 10))
    return built is not None and not isinstance(_outputs(built, shape, strict=True), Exception)


def check_other_sizes(config: ModelConfig, module: nn.Module, shape: tuple[int, int, int], sizes: Mapping[str, Size]) -> None:
    """Raise `UserError` when the model, which takes images of *shape* on meta, cannot take one of *sizes*, by key, as well."""
    for key, size in sizes.items():
        if size == shape[1:]:
            continue
        _check_patches(key, config.name, module, size)
        error = _outputs(module, (shape[0], *size), strict=True)
        if not isinstance(error, Exception) or isinstance(_outputs(module, shape, strict=True), Exception):
            continue
        fix = "try another size"
        if config.options.get(FLEXIBLE) is False:
            fix = f"drop model.options.{FLEXIBLE}"
        elif _takes(config, (shape[0], *size)):
            fix = "drop the key, or train at the other model.image_size in a second run, from this one's step as model.weights"
        words = f"{config.name} cannot take {size[0]} x {size[1]} pixels beside {shape[1]} x {shape[2]} ({first_line(error)})"
        raise UserError(f"{key}: {words}; {fix}")


def _check_patches(key: str, name: str, module: nn.Module, size: Size) -> None:
    """Raise `UserError` where patches would leave a part of an image of *size* out, which timm does without a word."""
    for part in module.modules():
        if not isinstance(part, PatchEmbed) or part.dynamic_img_pad:
            continue
        patch = int(part.patch_size[0]), int(part.patch_size[1])
        for side, step in zip(size, patch):
            if side % step:
                fits = [str(one) for one in (side - side % step, side - side % step + step) if one]
                raise UserError(
                    f"{key}: {size[0]} x {size[1]} pixels are not whole patches of {name}, {patch[0]} x {patch[1]}: use "
                    f"{either(fits)} instead of {side}, or another model.options.patch_size"
                )


def check_runs(config: ModelConfig, module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise `UserError` when *module*, which a task built around a timm model, cannot take images of *shape*, on meta."""
    outputs = _outputs(module, shape)
    if isinstance(outputs, Exception) and not _only_on_meta(outputs):
        raise UserError(
            f"model.name: what the task builds around {config.name} {_not_taken(shape, outputs)}; try another model"
        )


def _outputs(module: nn.Module, shape: tuple[int, ...], training: bool = False, strict: bool = False) -> Any:
    """What *module*, on meta, returns for 2 images, or the error that it raises; *strict*: as where there are values."""

    def refuse_nothing(part: nn.Module, inputs: object, output: Tensor) -> None:
        # On meta torch 2.11 lets one side of an image be smaller than a kernel.
        if isinstance(part, nn.Conv2d) and not output.numel():
            raise ValueError("a convolution's kernel is larger than its input")

    twin = copy.deepcopy(module).train(training)  # some models keep what they compute
    for part in twin.modules() if strict else ():
        part.register_forward_hook(refuse_nothing)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return twin(torch.empty(2, *shape, device="meta"))
    except Exception as error:
        return error


def _only_on_meta(error: Exception) -> bool:
    return isinstance(error, NotImplementedError) or "meta" in str(error)


def _not_taken(shape: tuple[int, int, int], error: Exception) -> str:
    return f"cannot take images of {' x '.join(map(str, shape))} ({one_line(error)})"


def given_card(name: str, outputs: int | None, shape: tuple[int, int, int], **normalised: Any) -> dict[str, Any]:
    """config.json of its checkpoints: what is known, and that timm cannot build it."""
    return {
        "architecture": name,
        "num_classes": outputs,
        "pretrained_cfg": {"input_size": list(shape), **normalised},
        "note": "This model was given from Python and is none of timm's: load model.safetensors into your own module.",
    }


def image_size(config: ModelConfig) -> Size | None:
    """``model.image_size`` as height and width."""
    return None if config.image_size is None else pair(config.image_size)


def create_arguments(config: ModelConfig, num_classes: int, flexible: bool = False) -> dict[str, Any]:
    """What the configuration asks for; *flexible*: of a model that gets images of several sizes.

    Raises `UserError` for an option that has a key of its own or is not ours to pass.
    """
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
    if flexible:
        arguments[FLEXIBLE] = True
    return {**arguments, **config.options}


def accepted(
    config: ModelConfig, num_classes: int, build: Callable[[dict[str, Any]], nn.Module], flexible: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """`build` the model and return it with the arguments it took.

    ``img_size`` is offered to every model and taken back from those without such an argument: they take any size. So are a
    ``drop_path_rate`` of 0 and, for a *flexible* model, ``dynamic_img_size``. Raises `UserError` for the other arguments that
    the constructor does not know; lets every other exception through.
    """
    arguments = create_arguments(config, num_classes, flexible)
    while True:
        try:
            return build(arguments), arguments
        except TypeError as error:
            _, unexpected, names = str(error).partition("unexpected keyword argument")
            unknown = [name for name in re.findall(r"'(\w+)'", names) if name in arguments] if unexpected else []
            if not unknown:
                raise
            for name in unknown:
                if name == "img_size" or (name == "drop_path_rate" and config.drop_path == 0):
                    continue
                if name == FLEXIBLE and name not in config.options:
                    continue
                if name == "drop_path_rate":
                    words = f"{config.name} has no stochastic depth to set to {config.drop_path}; use 0.0"
                    raise UserError(f"model.drop_path: {words}") from None
                module = _on_meta(config.name, _without(arguments, *config.options))
                known = inspect.signature(type(module).__init__).parameters if module is not None else ()
                words = f"{config.name} has no such option{nearest(name, known) or '; remove it'}"
                raise UserError(f"model.options.{name}: {words}") from None
            arguments = _without(arguments, *unknown)


def blame(config: ModelConfig, num_classes: int, error: Exception) -> UserError:
    """The `UserError` for a constructor that raised `error`: the key without which the model can be built."""
    arguments, reason = create_arguments(config, num_classes), first_line(error)
    if "img_size" in arguments and _on_meta(config.name, _without(arguments, "img_size")) is not None:
        height, width = image_size(config) or (0, 0)
        channels = config.options.get("in_chans", 3)
        fix = _other_size(config, (channels, height, width))
        return UserError(f"model.image_size: {config.name} cannot take {height} x {width} pixels ({reason}); {fix}")
    for key, value, them, _ in _without_options(config, arguments):
        return UserError(f"{key}: {config.name} cannot be built with {value!r} ({reason}); change {them}")
    return UserError(f"model.name: timm cannot build {config.name} ({reason}); choose another model")


def check_outputs(config: ModelConfig, num_classes: int, module: nn.Module, shape: tuple[int, int, int]) -> None:
    """Raise `UserError` where *module*, on meta, returns no class scores for images of *shape* because of ``model.options``."""
    if not config.options or not (wrong := _wrong_outputs(module, num_classes, shape)):
        return
    for key, value, them, other in _without_options(config, create_arguments(config, num_classes)):
        if not _wrong_outputs(other, num_classes, shape):
            raise UserError(f"{key}: with {value!r} {config.name} {wrong}; change {them}")


def _without_options(config: ModelConfig, arguments: dict[str, Any]) -> Iterator[tuple[str, Any, str, nn.Module]]:
    """The options without which the model can be built, first each alone: key, value, a pronoun, the model without them."""
    sets = [((name,), f"model.options.{name}", value, "it") for name, value in config.options.items()]
    for names, key, value, pronoun in (*sets, (tuple(config.options), "model.options", config.options, "them")):
        if names and (module := _on_meta(config.name, _without(arguments, *names))) is not None:
            yield key, value, pronoun, module


def _wrong_outputs(module: nn.Module, num_classes: int, shape: tuple[int, int, int]) -> str:
    """What is wrong with what *module* returns in evaluation or training; "" where nothing is, or meta cannot tell."""
    for training in (False, True):
        outputs = _outputs(module, shape, training)
        if isinstance(outputs, Exception):
            return "" if _only_on_meta(outputs) else _not_taken(shape, outputs)
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if found != (2, num_classes):
            mode = "in training " if training else ""
            return f"returns {found} for 2 images {mode}instead of scores (2, {num_classes})"
    return ""


def _without(arguments: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in names}


def _on_meta(name: str, arguments: dict[str, Any]) -> nn.Module | None:
    for missing in ((), ("img_size",), ("drop_path_rate",), ("img_size", "drop_path_rate")):
        try:
            with torch.device("meta"):
                return timm.create_model(name, **_without({**arguments, "pretrained": False}, *missing))
        except Exception:
            continue
    return None


def sized_tensors(config: ModelConfig, size: Size) -> list[str]:
    """What a file has of the model, and whose shape follows the size of the images, such as *size*."""
    sides = (size, (2 * max(size), 2 * max(size)))
    made = [_on_meta(config.name, create_arguments(replace(config, image_size=each), 10)) for each in sides]
    one, other = ({} if module is None else module.state_dict() for module in made)
    return [name for name in one if name in other and one[name].shape != other[name].shape]


def check_model(config: ModelConfig, model: GivenModel | None = None) -> None:
    """Raise `UserError` for an unknown model name or a weights file that cannot be read. Builds nothing, reads only headers."""
    name, _ = current_name(config.name)
    if model is None:
        check_name(name)
    elif not isinstance(model, nn.Module) and not callable(model):
        raise UserError(f"model: {type(model).__name__} is no model: give a timm name, a module, or a function that builds one")
    wrappers = ("torch.nn.parallel", "torch.distributed", "deepspeed")
    if isinstance(model, nn.Module) and type(model).__module__.startswith(wrappers):
        raise UserError(f"model: {type(model).__name__} is wrapped already: give the plain module")
    ours = {"model.pretrained": config.pretrained, "model.weights": config.weights, "model.drop_path": config.drop_path}
    if config.drop_path_schedule != "linear":
        ours["model.drop_path_schedule"] = config.drop_path_schedule
    for key, value in ours.items() if model is not None else ():
        if value:
            raise UserError(f"{key}: {value}, but the model is your own: load or set it there, and leave this out")
    if isinstance(model, nn.Module) and config.options:
        raise UserError(f"model.options: {next(iter(config.options))}, but the model is built already: leave them out")
    if config.weights is not None and config.pretrained:
        raise UserError(f"model.weights: {config.weights} and model.pretrained: true exclude each other; keep one")
    if config.weights is not None:
        WeightsFile(config.weights, "model.weights")
    elif config.pretrained:
        cards = get_arch_pretrained_cfgs(split_model_name_tag(name)[0])
        if not any(card.has_weights for card in cards.values()):
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
        folder, found = name.partition(":")[2], None
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(Path(folder, "config.json").expanduser().read_bytes())["architecture"]
        architecture = found if is_model(str(found)) else "the architecture of its config.json"
        raise UserError(f"model.name: {name}: write {architecture} there, and model.weights: {folder}")
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
