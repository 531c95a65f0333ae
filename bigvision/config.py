"""The run configuration: dataclasses, filled from a YAML recipe, then from flags. Nothing in a recipe names code."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

import yaml

from bigvision.errors import UserError, nearest

Overrides = Mapping[str, tuple[Any, str]]
"""Dotted key → (value, where it came from)."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = "vit_tiny_patch16_224"
    """A timm model name."""
    pretrained: bool = False
    """Start from timm's pretrained weights (needs a network or timm's cache)."""
    weights: str | None = None
    """Start from this local safetensors file (timm's parameter names)."""
    image_size: int | None = None
    """Side of the square input in pixels; null takes the model's own."""
    num_classes: int | None = None
    """Outputs of the classifier; null takes the number of classes in the data."""
    drop_path: float = 0.0
    """Stochastic depth rate (Huang et al. 2016)."""
    options: dict[str, Any] = field(default_factory=dict)
    """More keyword arguments for the timm constructor, e.g. '{patch_size: 4, depth: 6}'."""


@dataclass(frozen=True)
class TaskConfig:
    name: Literal["classify"] = "classify"
    label_smoothing: float = 0.0
    """Weight of the uniform distribution in the target (Szegedy et al. 2016)."""


@dataclass(frozen=True)
class DataConfig:
    train: str = "digits"
    """digits, imagefolder:PATH, mnist, fashion-mnist, cifar10, cifar100, synthetic[:SAMPLES[xSIZE]]."""
    val: str = "digits"
    """The same choices; the validation split of that dataset."""
    workers: int = 2
    """Decoding processes per rank; 0 decodes in the training process. The samples do not depend on it."""
    root: str = "data"
    """Folder of the datasets that torchvision downloads."""
    augment: bool = True
    """Random crops, shifts and flips that fit the dataset; false feeds the training images as the evaluation ones."""


@dataclass(frozen=True)
class OptimConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decoupled for adamw; never applied to norms, biases and other tensors with fewer than two dimensions."""
    layer_decay: float | None = None
    """Each layer's rate is that of the layer above times this factor, e.g. 0.75; null: the same rate for all."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the moments."""
    momentum: float = 0.9
    """SGD's (Nesterov) momentum."""
    clip: float | None = 1.0
    """Largest norm of the whole model's gradient; null does not clip."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate after the warm-up."""
    warmup: float = 0.05
    """Share of all steps (below 1) or number of steps (1 and above) over which the rate rises linearly from 0."""


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Literal["ddp", "fsdp", "zero1", "zero2", "zero3"] = "fsdp"
    """ddp: a whole copy per rank. fsdp: every parameter sharded over the ranks of a replica. zero1, zero2, zero3:
    DeepSpeed, which shards the optimizer state, then the gradients too, then the parameters too."""
    replicas: int = 1
    """fsdp: full copies of the model, each sharded over ranks / replicas ranks."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """What is computed in; master weights, gradient reduction and optimizer state stay fp32."""
    recompute: Literal["none", "blocks"] = "none"
    """blocks: keep only each block's input and compute its activations again in the backward pass."""
    compile: bool = False
    """Compile each block with torch.compile."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """zero1, zero2, zero3: keep the optimizer state in CPU memory and take its step there; all: the parameters too (zero3)."""
    deepspeed: str | None = None
    """A DeepSpeed configuration file (JSON): its ZeRO stage is the strategy, "auto" in it takes the values from here."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA when the machine has it."""


@dataclass(frozen=True)
class TrainConfig:
    epochs: float = 5.0
    """Passes over the training data."""
    steps: int | None = None
    """Optimizer steps in all; overrides epochs."""
    global_batch: int = 128
    """Samples per optimizer step over all ranks."""
    micro_batch: int | None = None
    """Samples in one forward and backward pass on one rank; null takes the rank's whole part of the global batch."""
    eval_every: int | None = None
    """Steps between evaluations; null evaluates at each epoch's end. The last step is always evaluated."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int | None = None
    """Steps between checkpoints; null saves at each epoch's end. The last step is always saved."""
    keep: int = 3
    """Newest valid checkpoints kept in the output folder."""
    resume: str = "auto"
    """auto (the newest valid one in `out`), never, or the path of any run's step folder."""
    shard_size: str = "5GB"
    """Largest size of one model or optimizer file (units kB, MB, GB, KiB, MiB, GiB)."""
    verify: bool = True
    """Check every checksum before resuming; false checks sizes and headers only."""


@dataclass(frozen=True)
class MonitorConfig:
    progress: bool = True
    """Show a progress bar (on rank 0)."""
    every: int = 10
    """Steps between lines of metrics.jsonl."""


@dataclass(frozen=True)
class Config:
    out: str = "checkpoints/digits"
    """Output folder: run.yaml, metrics.jsonl and the checkpoints."""
    seed: int = 0
    """Weights, data order, augmentation and dropout are functions of it."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitor: MonitorConfig = MonitorConfig()

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain YAML data; :func:`load_config` reads it back."""
        plain = dataclasses.asdict(self)
        plain["optim"]["betas"] = list(self.optim.betas)
        return plain


def load_config(
    recipe: str | Path | Mapping[str, Any] | None = None, flags: Sequence[str] = (), overrides: Overrides | None = None
) -> Config:
    """Build the configuration from a recipe (a YAML file or a mapping), then *overrides*, then command-line *flags*.

    Raises:
        UserError: an unknown key (with the nearest right name), a wrong type or an impossible value.
    """
    return resolve(recipe, flags, overrides)[0]


def resolve(
    recipe: str | Path | Mapping[str, Any] | None = None,
    flags: Sequence[str] = (),
    overrides: Overrides | None = None,
    prog: str = "bigvision train",
) -> tuple[Config, dict[str, str]]:
    """As :func:`load_config`, and with it where each dotted key's value came from."""
    kinds = dict(_leaves(Config))
    given: dict[str, tuple[Any, str]] = {}
    if recipe is not None:
        where = "the given mapping" if isinstance(recipe, Mapping) else str(recipe)
        tree = recipe if isinstance(recipe, Mapping) else _read_yaml(Path(recipe))
        given |= {key: (value, where) for key, value in _flatten(tree, kinds, where).items()}
    given |= overrides or {}
    from_flags = _parse_flags(_build(given, kinds), list(flags), kinds, prog)
    for key, value in from_flags.items():
        if key in (overrides or {}) and _coerce(value, kinds[key], key, "flag") != (asked := given[key])[0]:
            raise UserError(f"--{key} {value} contradicts {asked[1]}, which asks for {asked[0]!r}: drop one of the two")
        given[key] = (value, "flag")
    config = _build(given, kinds)
    _check(config)
    return config, {key: given[key][1] if key in given else "default" for key in kinds}


def describe(config: Config, origins: Mapping[str, str]) -> str:
    """The configuration as YAML, each value followed by where it came from."""
    lines = []
    section = ""
    for key, origin in origins.items():
        head, _, name = key.rpartition(".")
        if head != section:
            section = head
            lines.append(f"{head}:")
        indent = "  " if head else ""
        text = f"{indent}{name or key}: {_spell(_get(config, key))}"
        lines.append(f"{text:<60}  # {origin}")
    return "\n".join(lines)


def parse_size(text: str, key: str) -> int:
    """Bytes in a size such as ``5GB`` (decimal) or ``512MiB`` (binary).

    Raises:
        UserError: not a positive number followed by a known unit.
    """
    units = {"B": 1, "": 1}
    for power, letter in enumerate("KMGT", start=1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power}
    number = text.rstrip("BbKkMmGgTtIi ").strip()
    unit = text[len(number) :].strip().upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(f"{key}: {text!r} is not a size: write a number and a unit, such as 5GB or 512MiB")
    return size


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"recipe {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"recipe {path}: must hold sections such as 'model:' and 'train:', not {_spell(tree)}")
    return tree


def _leaves(cls: type, prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _leaves(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _flatten(tree: Mapping[str, Any], kinds: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    sections = {key.rpartition(".")[0] for key in kinds}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in kinds:
            flat[key] = value
        elif key in sections and isinstance(value, Mapping):
            flat |= _flatten(value, kinds, where, f"{key}.")
        elif key in sections:
            raise UserError(f"{where}: {key} must be a section of keys, not {_spell(value)}")
        else:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, [*kinds, *sections])}")
    return flat


def _build(given: Overrides, kinds: Mapping[str, Any]) -> Config:
    config = Config()
    for key, (value, where) in given.items():
        value = _coerce(value, kinds[key], key, where)
        section, _, name = key.rpartition(".")
        if section:
            name, value = section, dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{name: value})
    return config


def _coerce(value: Any, kind: Any, key: str, where: str) -> Any:
    """Return *value*, as YAML gives it, as *kind*; YAML 1.1 reads 1e-3 as text, so numbers in text are accepted."""
    for option in typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,):
        if option is type(None):
            if value is None:
                return None
        elif typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif option is bool or option is str:
            if isinstance(value, option):
                return value
        elif option is int:
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        elif option is float:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                try:
                    return float(value)
                except ValueError:
                    pass
        elif typing.get_origin(option) is tuple:
            if isinstance(value, (list, tuple)) and len(value) == len(typing.get_args(option)):
                return tuple(_coerce(item, part, key, where) for item, part in zip(value, typing.get_args(option)))
        elif isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            return dict(value)
    choices = [choice for choice in typing.get_args(kind) if isinstance(choice, str)]
    hint = nearest(str(value), choices) if choices else ""
    raise UserError(f"{key}: {_spell(value)} ({where}) is not {_kind_name(kind)}{hint}")


def _kind_name(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_kind_name(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {len(typing.get_args(kind))} numbers"
    if typing.get_origin(kind) is dict:
        return "a mapping of names to values"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    return names.get(kind, "a value")


def _spell(value: Any) -> str:
    """*value* on one line as YAML spells it."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _parse_flags(defaults: Config, flags: list[str], kinds: Mapping[str, Any], prog: str) -> dict[str, Any]:
    """Return the YAML value of each ``--section.key value``; *defaults* are what ``--help`` shows."""
    if not flags:
        return {}
    import tyro  # a fifth of a second, and only flags need it
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    # The text is kept as it was given: only afterwards is it known which key an error has to name.
    @registry.primitive_rule
    def _(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if dataclasses.is_dataclass(info.type):
            return None
        choices = typing.get_args(info.type) if typing.get_origin(info.type) is Literal else ()
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="|".join(choices) or _kind_name(info.type).upper().replace(" ", "-"),
            instance_from_str=lambda texts: _Given(texts[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [_spell(value)],
        )

    show_help = any(flag in ("-h", "--help") for flag in flags)
    try:
        parsed, unknown = tyro.cli(
            Config,
            prog=prog,
            description="Train a timm model: bigvision train [RECIPE.yaml] [--section.key value ...]",
            args=flags,
            default=defaults,
            registry=registry,
            return_unknown_args=True,
            use_underscores=True,
            console_outputs=show_help,
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(f"flags: a value is missing in {' '.join(flags)!r}: write --section.key value") from None
    if unknown:
        name = unknown[0].split("=")[0]
        known = [f"--{key}" for key in kinds]
        raise UserError(f"unknown {'flag' if name.startswith('-') else 'argument'} {name!r}{nearest(name, known)}")
    values: dict[str, Any] = {}
    for key in kinds:
        if isinstance(value := _get(parsed, key), _Given):
            try:
                values[key] = yaml.safe_load(value.text) if value.text else ""
            except yaml.YAMLError:
                raise UserError(f"--{key}: {value.text!r} is not a value that YAML can read") from None
            # A folder named 2024 is still a text.
            if kinds[key] is str and not isinstance(values[key], str):
                values[key] = value.text
    return values


@dataclass(frozen=True)
class _Given:
    text: str


def _check(config: Config) -> None:
    """Values that no run can have. What depends on ranks, model or data is checked where those are known."""
    for key, lowest in {
        "seed": 0, "data.workers": 0, "parallel.replicas": 1, "train.global_batch": 1, "train.micro_batch": 1,
        "train.steps": 0, "train.eval_every": 1, "checkpoint.every": 1, "checkpoint.keep": 1, "monitor.every": 1,
        "model.image_size": 1, "model.num_classes": 1, "optim.warmup": 0, "optim.lr": 0, "optim.weight_decay": 0,
        "task.label_smoothing": 0, "model.drop_path": 0,
    }.items():  # fmt: skip
        value = _get(config, key)
        if value is not None and not lowest <= value < math.inf:
            raise UserError(f"{key}: {value} must be a finite number from {lowest} on")
    if config.seed >= 2**63:
        raise UserError(f"seed: {config.seed} must be below 2**63")
    for key in ("task.label_smoothing", "model.drop_path"):
        if not _get(config, key) < 1:
            raise UserError(f"{key}: {_get(config, key)} must be below 1")
    if not 0 < config.train.epochs < math.inf:
        raise UserError(f"train.epochs: {config.train.epochs} must be a number above 0")
    for key, values in (("optim.betas", config.optim.betas), ("optim.momentum", (config.optim.momentum,))):
        if not all(0 <= value < 1 for value in values):
            raise UserError(f"{key}: {_spell(_get(config, key))} must be from 0 to below 1")
    if config.optim.clip is not None and not config.optim.clip > 0:
        raise UserError(f"optim.clip: {config.optim.clip} must be above 0; null does not clip")
    if config.parallel.strategy != "fsdp" and config.parallel.replicas != 1:
        raise UserError(f"parallel.replicas: {config.parallel.replicas} needs parallel.strategy fsdp")
    if config.model.pretrained and config.model.weights:
        raise UserError("model.pretrained: true contradicts model.weights: choose one of the two")
    parse_size(config.checkpoint.shard_size, "checkpoint.shard_size")
