"""From a timm name to a module on the meta device, the real values of its tensors, and timm's card for it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

import timm
import timm.data
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from bigvision.config import LoraConfig, ModelConfig, Size
from bigvision.errors import UserError, one_line
from bigvision.models import arguments, lora, weights
from bigvision.models.arguments import GivenModel
from bigvision.models.drop_path import set_constant_rate
from bigvision.models.exact_init import FirstValues, NotRecordable, construct, given
from bigvision.models.tracing import named_tensors
from bigvision.models.weights import Adapted, Loading, capture

Around = Callable[..., nn.Module]
"""What is called as `timm.create_model` is."""


def model_card(
    module: nn.Module, image_size: Size, mean: Sequence[float], std: Sequence[float], val_size: Size | None = None
) -> dict[str, Any]:  # fmt: skip
    """The content of ``config.json`` with which ``timm.create_model("local-dir:FOLDER", pretrained=True)`` makes this model.

    `module` is the timm model, on any device and sharded or not: only its attributes are read. `image_size` is height and width
    in pixels, `val_size` that of evaluations where it is another; `mean` and `std` are those the images were normalised with.
    As in timm, the drop rates of training are left out.
    """
    channels = getattr(module, "in_chans", len(mean))
    data = {"input_size": (channels, *image_size), "mean": tuple(mean), "std": tuple(std)}
    if val_size is not None and val_size != image_size:
        data["test_input_size"] = (channels, *val_size)
    with TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        save_config_for_hf(module, str(path), data_config=data)
        return json.loads(path.read_text())


class Blueprint:
    """A model before it has memory."""

    module: nn.Module  # timm's, or the caller's own, with all parameters and buffers on meta, to be sharded or cut in place
    image_size: tuple[int, int]  # height and width of the input in pixels
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]  # per channel, of inputs in [0, 1]
    interpolation: str
    crop_pct: float
    crop_mode: Literal["center", "squash", "border"]  # how timm resizes for evaluation: filter, share kept, sides
    recorded: bool  # False: the model was built normally, at the memory of all of it, or was given with its values
    notes: list[str]  # what the user should know, a line each: why it is not recorded, what starts fresh beside weights

    arguments: dict[str, Any]  # the keyword arguments that ``timm.create_model`` took
    outputs: int | None = None  # of the caller's own model; None where that cannot be known before it runs, and of timm's
    flops: Mapping[Size, float | None] = MappingProxyType({})  # of a training image of each size, where somebody counted them

    def __init__(
        self, config: ModelConfig, num_classes: int | None, model: GivenModel | None = None, around: Around | None = None,
        sizes: Mapping[str, Size] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        loading = Loading()
        if isinstance(model, nn.Module):
            self.arguments = {}
            self.module, self._first = _given(model)
        else:
            create, flexible = around or timm.create_model, bool(sizes)
            self.module, self.arguments, self._first = _construct(config, num_classes or 0, model, create, loading, flexible)
            if config.drop_path_schedule == "constant" and config.drop_path > 0:
                set_constant_rate(self.module, config.drop_path, config.name)
        self._names = {name for name, _ in named_tensors(self.module)}
        self.adapters: dict[str, lora.Parameter] = {}  # of LoRA, by each of their names
        self.recorded, self.notes = self._first.trace is not None, self._first.notes
        self._given: Adapted | None = None
        if config.weights is not None or config.pretrained:
            self._given, notes = weights.read(config, self.module, loading)
            self.notes += notes
        data = timm.data.resolve_model_data_config(self.module)
        self.in_chans = getattr(self.module, "in_chans", data["input_size"][0])
        self.image_size = arguments.image_size(config) or tuple(data["input_size"][1:])
        self.interpolation, self.crop_pct, self.crop_mode = (data[key] for key in ("interpolation", "crop_pct", "crop_mode"))
        # timm's cards keep three values for any number of channels.
        self.mean, self.std = (
            tuple(values) if len(values) == self.in_chans else (math.fsum(values) / len(values),) * self.in_chans
            for values in (data["mean"], data["std"])
        )
        if model is not None:
            if config.image_size is None and not hasattr(self.module, "pretrained_cfg"):
                raise UserError(f"model.image_size: {config.name} does not say which it takes: give the side of the images")
            if num_classes is None:
                return
            self.outputs = arguments.outputs_of(config, self.module, self.input_shape)
            if self.outputs is not None and self.outputs < num_classes:
                raise UserError(f"model: {config.name} has {self.outputs} outputs, but there are {num_classes} classes")
            arguments.check_other_sizes(config, self.module, self.input_shape, sizes)
            return
        if around is not None:
            arguments.check_runs(config, self.module, self.input_shape)
            arguments.check_other_sizes(config, self.module, self.input_shape, sizes)
            return
        if config.image_size is not None:
            # A model made for this size is judged by it; another one also by whether meta can run it at all.
            usual = None if "img_size" in self.arguments else tuple(data["input_size"][1:])
            arguments.check_size(config, self.module, self.input_shape, usual)
        if num_classes is not None:
            arguments.check_outputs(config, num_classes, self.module, self.input_shape)
        arguments.check_other_sizes(config, self.module, self.input_shape, sizes)

    def add_adapters(self, config: LoraConfig) -> None:
        """Give the layers that *config* names adapters; a `UserError` where it fits none."""
        self.notes += lora.add_adapters(self.module, config, self.input_shape)
        self.adapters = lora.adapters(self.module)
        self._names |= self.adapters.keys()

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

        Only these are read, straight into *values* where types and devices agree. Raises `UserError` when the file ends early.
        """
        assert self._given is not None
        self._given.read(name, start, values)

    def tensors(self, seed: int, names: Set[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, value)`` once for every parameter and buffer, persistent or not, in no particular order.

        Values are, bit for bit, those that ``torch.manual_seed(seed); timm.create_model(...)`` gives on the CPU; those of
        adapters are functions of *seed* and their names. Only *names*, where given, are read, drawn and computed. Tied names
        share memory, unless they come from a weights file. Drop each value before asking for the next: one is held at a time.
        The caller's random state is not touched. Raises `UserError` when the weights file cannot be read.
        """
        left = self._names if names is None else self._names & names
        drawn = left & self.adapters.keys()
        for name in sorted(drawn):
            yield name, self.adapters[name].first_value(seed)
        left = left - drawn
        if self._given is not None:
            for name, value in self._given.tensors(seed, left):
                left = left - {name}
                yield name, value
                del value
        yield from self._first.tensors(seed, left)

    def fill_attributes(self, module: nn.Module, device: torch.device | str) -> None:
        """Give tensors of `module` that are neither parameters nor buffers values on `device` (few timm models have any)."""
        self._first.set_attributes(module, device)


def blueprint(
    config: ModelConfig, num_classes: int | None, model: GivenModel | None = None, around: Around | None = None,
    sizes: Mapping[str, Size] = MappingProxyType({}),
) -> Blueprint:  # fmt: skip
    """Describe the model of `config` with `num_classes` outputs, or the given one, without giving it memory.

    With None the model may return anything, and timm's returns features. `around` is called in the place of
    ``timm.create_model``, with the same arguments. `sizes` are those of images that the model gets beside its own, by the keys
    that ask for them.

    Raises `UserError` for names, options, sizes and weight files that do not fit each other.
    """
    arguments.check_model(config, model)
    if model is not None:
        plan = Blueprint(config, num_classes, model, sizes=sizes)
    else:
        name, note = arguments.current_name(config.name)
        plan = Blueprint(replace(config, name=name), num_classes, around=around, sizes=sizes)
        plan.notes[:0] = [note] if note else []
    if config.lora is not None:
        plan.add_adapters(config.lora)
    return plan


def _given(module: nn.Module) -> tuple[nn.Module, FirstValues]:
    for name, tensor in named_tensors(module):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise UserError(f"model: {name} is {str(tensor.dtype).removeprefix('torch.')}: give it in fp32, as model.float()")
    try:
        return given(module)
    except (NotRecordable, RuntimeError, TypeError) as error:
        words = f"cannot be copied ({one_line(error)}); give a function instead"
        raise UserError(f"model: {arguments.given_name(module)} {words}") from error


def _construct(
    config: ModelConfig, num_classes: int, function: Callable[..., nn.Module] | None, create: Around, loading: Loading,
    flexible: bool,
) -> tuple[nn.Module, dict[str, Any], FirstValues]:  # fmt: skip
    """The module on meta, the arguments it was made with, and its first values; *loading* gets what timm would load.

    *flexible*: it gets images of several sizes.
    """

    def build(taken: dict[str, Any]) -> nn.Module:
        with capture() as caught:
            made = create(config.name, **taken) if function is None else function(**taken)
        if not isinstance(made, nn.Module):
            raise UserError(f"model: {config.name} returned {type(made).__name__}, not a module")
        loading.take(caught, made)
        return made

    def choose(build: Callable[[dict[str, Any]], nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
        if function is None:
            return arguments.accepted(config, num_classes, build, flexible)
        taken = arguments.call_arguments(config, num_classes, function)
        return build(taken), taken

    try:
        return construct(build, choose, config.name)
    except UserError:
        raise
    except Exception as error:
        if function is None:
            raise arguments.blame(config, num_classes, error) from error
        raise UserError(f"model: {config.name} cannot be built ({type(error).__name__}: {one_line(error)})") from error
