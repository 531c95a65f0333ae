"""From a timm name to a module on the meta device, the real values of its tensors, and timm's card for it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Set
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import timm
import timm.data
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from bigvision.config import ModelConfig
from bigvision.errors import UserError
from bigvision.models import weights
from bigvision.models.arguments import (
    GivenModel,
    accepted,
    blame,
    built,
    call_arguments,
    check_model,
    check_outputs,
    current_name,
    failed,
    image_size,
    on_meta,
    outputs_of,
)
from bigvision.models.exact_init import FirstValues, construct, named_tensors
from bigvision.models.weights import Adapted, Loading, capture


def model_card(
    config: ModelConfig,
    num_classes: int,
    module: nn.Module,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> dict[str, Any]:
    """The content of ``config.json`` with which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` makes this model.

    `module` is the timm model, on any device and sharded or not: only its attributes are read. `image_size` is height and width
    in pixels; `mean` and `std` are those the images were normalised with. As in timm, the drop rates of training are left out.
    """
    channels = getattr(module, "in_chans", len(mean))
    data = {"input_size": (channels, *image_size), "mean": tuple(mean), "std": tuple(std)}
    with TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        save_config_for_hf(module, str(path), data_config=data)
        card = json.loads(path.read_text())
    assert card["num_classes"] == num_classes
    return card


class Blueprint:
    """A model before it has memory.

    `module` is the timm model, or the caller's own, with every parameter and buffer on the meta device, to be sharded or cut
    in place.
    `tensors` gives the values that a normal ``torch.manual_seed(seed); timm.create_model(...)`` on the CPU gives, bit for
    bit, holding one tensor (and what the caller keeps) at a time.
    """

    module: nn.Module
    image_size: tuple[int, int]
    """Height and width of the input in pixels."""
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel, of inputs in [0, 1]."""
    interpolation: str
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]
    """How timm resizes for evaluation: the filter, the share of the resized sides that the crop keeps, and which sides are
    resized to the input's."""
    recorded: bool
    """False: the model was built normally, which gives the same numbers and needs the memory of the whole model, or was given
    with its values."""
    notes: list[str]
    """What the user should know, one line each: why `recorded` is False, what starts fresh although weights were given."""

    arguments: dict[str, Any]
    """The keyword arguments that ``timm.create_model`` took."""
    outputs: int | None = None
    """Of the caller's own model; None where that cannot be known before it runs, and of timm's."""

    def __init__(self, config: ModelConfig, num_classes: int, model: GivenModel | None = None) -> None:
        loading: Loading = {}
        if isinstance(model, nn.Module):
            self.module, attributes = on_meta(model)
            self.arguments, self._first = {}, FirstValues(lambda: model, attributes)
        else:
            self.module, self.arguments, self._first = _construct(config, num_classes, model, loading)
        self._names = {name for name, _ in named_tensors(self.module)}
        self.recorded, self.notes = self._first.recording is not None, self._first.notes
        self._given: Adapted | None = None
        if config.weights is not None or config.pretrained:
            self._given, notes = weights.read(config, self.module, loading)
            self.notes += notes
        data = timm.data.resolve_model_data_config(self.module)
        self.in_chans = getattr(self.module, "in_chans", data["input_size"][0])
        self.image_size = image_size(config) or tuple(data["input_size"][1:])
        self.interpolation, self.crop_pct, self.crop_mode = (data[key] for key in ("interpolation", "crop_pct", "crop_mode"))
        # timm's cards keep three values for any number of channels.
        self.mean, self.std = (_per_channel(data[key], self.in_chans) for key in ("mean", "std"))
        if model is not None:
            if config.image_size is None and not hasattr(self.module, "pretrained_cfg"):
                raise UserError(f"model.image_size: {config.name} does not say which it takes: give the side of the images")
            self.outputs = outputs_of(config, self.module, self.input_shape)
            if self.outputs is not None and self.outputs < num_classes:
                raise UserError(f"model: {config.name} has {self.outputs} outputs, but there are {num_classes} classes")
            return
        if config.image_size is not None:
            # A model made for this size is judged by it; another one also by whether meta can run it at all.
            usual = None if "img_size" in self.arguments else tuple(data["input_size"][1:])
            _check_size(config, self.module, self.input_shape, usual)
        check_outputs(config, num_classes, self.module, self.input_shape)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.in_chans, *self.image_size

    @property
    def note(self) -> str | None:
        """The notes as one line, or None."""
        return "; ".join(self.notes) or None

    def runs(self) -> list[str]:
        """The tensors whose values lie in the weights file as they are, so that `read` can read parts of them."""
        return self._given.runs() if self._given is not None else []

    def read(self, name: str, start: int, values: Tensor) -> None:
        """Fill the 1-D *values*, of any type and on any device, with the elements of one of `runs` from *start* on.

        Only these are read from the file, straight into *values* where types and devices agree.

        Raises:
            UserError: the file ends early or cannot be read.
        """
        assert self._given is not None
        self._given.read(name, start, values)

    def tensors(self, seed: int, names: Set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, value)`` once for every parameter and buffer, persistent or not, in no particular order.

        Only *names*, where given, are read, drawn and computed: nothing is drawn for names that need no random numbers.
        Values are finished CPU tensors of the module's dtypes; tied names share memory, unless they come from a weights
        file. Drop each before asking for the next. The caller's random state is not touched.

        Raises:
            UserError: the weights file ends early or cannot be read.
        """
        left = self._names if names is None else self._names & names
        if self._given is not None:
            for name, value in self._given.tensors(seed, left):
                left = left - {name}
                yield name, value
                del value
        yield from self._first.tensors(seed, left)

    def fill_attributes(self, module: nn.Module, device: torch.device | str) -> None:
        """Give plain tensor attributes of `module` (tensors that are neither parameters nor buffers) their values on `device`.

        Call it after ``module.to_empty(device=...)``. Almost no timm model has any. Submodules that `module` lacks (another
        pipeline stage's) are skipped.
        """
        self._first.set_attributes(module, device)


def blueprint(config: ModelConfig, num_classes: int, model: GivenModel | None = None) -> Blueprint:
    """Describe the model of `config` with `num_classes` outputs, or the given one, without giving it memory.

    Raises `UserError` for names, options, sizes and weight files that do not fit each other.
    """
    check_model(config, model)
    if model is not None:
        return Blueprint(config, num_classes, model)
    name, note = current_name(config.name)
    plan = Blueprint(replace(config, name=name), num_classes)
    plan.notes[:0] = [note] if note else []
    return plan


def _construct(
    config: ModelConfig, num_classes: int, function: Callable[..., nn.Module] | None, loading: Loading
) -> tuple[nn.Module, dict[str, Any], FirstValues]:
    """The module on meta, the arguments it was made with, and its first values; *loading* gets what timm would load."""

    def build(arguments: dict[str, Any]) -> nn.Module:
        with capture() as caught:
            made = timm.create_model(config.name, **arguments) if function is None else built(config, function(**arguments))
        loading.update(caught)
        return made

    def choose(build: Callable[[dict[str, Any]], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
        if function is None:
            return accepted(config, num_classes, build)
        arguments = call_arguments(config, num_classes, function)
        return build(arguments), arguments

    try:
        return construct(build, choose, config.name)
    except UserError:
        raise
    except Exception as error:
        raise (blame(config, num_classes, error) if function is None else failed(config, error)) from error


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (math.fsum(values) / len(values),) * channels


def _check_size(config: ModelConfig, module: nn.Module, shape: tuple[int, int, int], usual: tuple[int, ...] | None) -> None:
    """Raise `UserError` when the model cannot take images of *shape* although it takes its *usual* size, on meta."""

    def runs(size: tuple[int, ...]) -> Exception | None:
        twin = copy.deepcopy(module).eval()  # some models keep what they compute in evaluation mode
        for part in twin.modules():
            if isinstance(part, nn.Conv2d):
                part.register_forward_hook(_refuse_nothing)
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                twin(torch.empty(1, shape[0], *size, device="meta"))
        except Exception as error:
            return error
        return None

    size = shape[1:]
    if (error := runs(size)) is not None and (usual is None or runs(usual) is None):
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model.image_size: {config.name} cannot take {size[0]} x {size[1]} pixels ({reason}); try another size"
        )


def _refuse_nothing(module: nn.Module, inputs: object, output: Tensor) -> None:
    # On meta torch 2.11 lets one side of an image be smaller than a kernel.
    if not output.numel():
        raise ValueError("a convolution's kernel is larger than its input")
