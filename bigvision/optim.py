"""Optimizers by name, what is trained, parameter groups, and the learning rate as a pure function of the step.

In come a model's parameters by name and the section ``optim``; out come parameter groups, an optimizer of torch's, timm's or
DeepSpeed's over them, and the learning rate of a step. Clipping and stepping are the engine's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from bigvision.config import GroupConfig, OptimConfig
from bigvision.errors import UserError, nearest_paths


def freeze(module: nn.Module, trainable: str | Sequence[str], adapters: Collection[str] = ()) -> None:
    """Freeze all parameters but those that ``model.trainable`` names; one that is frozen already stays so.

    Where there are *adapters* (``model.lora``) these are always trained, and "all" means beside them the head.

    Raises `UserError` where that leaves nothing to train, or means nothing for this model.
    """
    trainable = "head" if adapters and trainable == "all" else trainable
    asked = f"model.trainable: {trainable if isinstance(trainable, str) else list(trainable)}"
    parameters = dict(module.named_parameters())
    if trainable == "all":
        return
    if trainable == "head":
        if not hasattr(module, "get_classifier"):
            raise UserError(f"{asked} needs timm's get_classifier, which {type(module).__name__} lacks: use a list of names")
        heads = module.get_classifier()  # type: ignore[operator]
        within = {p for head in (heads if isinstance(heads, (tuple, list)) else (heads,)) for p in head.parameters()}
        kept = {name for name, parameter in parameters.items() if parameter in within}
    elif isinstance(trainable, str):
        count = int(trainable.removeprefix("last:"))
        layers = _layers(module, asked, "use a list of names")
        top = max(layers.values())
        if count > top:
            raise UserError(f"{asked}, but the model has {top} layers below its head: use at most last:{top}, or all")
        kept = {name for name, layer in layers.items() if layer >= top - count}
    else:
        kept = set[str]().union(*(matching(module, name, "model.trainable") for name in trainable))
    kept.update(adapters)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in kept and parameter.requires_grad)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        why = "all that it names is frozen by the model" if kept else "the model has no classifier"
        raise UserError(f"{asked} leaves nothing to train: {why}: name other parameters, or use all")


@dataclass(frozen=True)
class Setting:
    """How one parameter is stepped."""

    lr_scale: float  # what the learning rate is multiplied with
    weight_decay: float
    rule: int | None  # the entry of ``optim.groups`` that decided


def parameter_groups(
    module: nn.Module, weight_decay: float, layer_decay: float | None = None, held: Mapping[str, Tensor] | None = None,
    rules: Sequence[GroupConfig] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Group the trainable parameters by what their rate is multiplied with, "lr_scale", and by "weight_decay".

    Each group carries "names", in the order of its "params", and holds either sharded or whole parameters, since a fused step
    takes one kind. The groups with the smallest rates come first, which with *layer_decay* are the stem's. *held* are the
    parameters that are stepped here, where they are others than the module's own (a pipeline stage's). See `settings`.
    """
    chosen = settings(module, weight_decay, layer_decay, rules)
    held = dict(module.named_parameters()) if held is None else held
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for name, setting in chosen.items():
        if name in held:
            key = (setting.lr_scale, setting.weight_decay, not isinstance(held[name], DTensor))
            group = groups.setdefault(key, _group([], [], *key[:2]))
            group["params"].append(held[name])
            group["names"].append(name)
    return [groups[key] for key in sorted(groups)] or [_group([], [])]  # a stage whose parameters are all frozen


def settings(
    module: nn.Module, weight_decay: float, layer_decay: float | None, rules: Sequence[GroupConfig]
) -> dict[str, Setting]:  # fmt: skip
    """The `Setting` of each trainable parameter, by name in the model's order; shapes have to be those of whole tensors.

    Norms, biases and what the timm model excludes by name are not decayed. The rate is multiplied with *layer_decay* for each
    layer, counted as timm does, from the head (Clark et al. 2020, Bao et al. 2022), then by the last of the *rules* that
    matches. A rule's weight decay is used for all that it matches, norms and biases too. Raises `UserError` for a rule without
    any effect.
    """
    from timm.optim import param_groups_weight_decay

    excluded = module.no_weight_decay() if hasattr(module, "no_weight_decay") else ()  # type: ignore[operator]
    names = {parameter: name for name, parameter in module.named_parameters()}
    decays = {
        names[parameter]: group["weight_decay"]
        for group in param_groups_weight_decay(module, weight_decay, no_weight_decay_list=excluded)
        for parameter in group["params"]
    }
    scales: dict[str, float] = {}
    if layer_decay is not None:
        layers = _layers(module, f"optim.layer_decay: {layer_decay}", "set it to null")
        top = max(layers.values())
        scales = {name: layer_decay ** (top - layer) for name, layer in layers.items()}
    matched = [matching(module, rule.match, f"optim.groups[{place}].match") for place, rule in enumerate(rules)]
    found: dict[str, Setting] = {}
    for name in names.values():
        if name in decays:
            place = max((place for place, among in enumerate(matched) if name in among), default=None)
            scale, decay = scales.get(name, 1.0), decays[name]
            if place is not None:
                scale *= rules[place].lr_scale
                decay = decay if (own := rules[place].weight_decay) is None else own
            found[name] = Setting(scale, decay, place)
    for place, rule in enumerate(rules):
        if not any(setting.rule == place for setting in found.values()):
            frozen = not matched[place] & found.keys()
            why = "all that it matches is frozen" if frozen else "later entries match the same, and the last match wins"
            fix = "drop it, or change model.trainable" if frozen else "put it behind them"
            raise UserError(f"optim.groups[{place}].match: {rule.match!r} has no effect: {why}: {fix}")
    return found


def _layers(module: nn.Module, asked: str, fix: str) -> dict[str, int]:
    """The layer of each parameter as timm counts them: the stem is 0, the head the highest. What was *asked* needs them."""
    from timm.models import group_parameters

    if not hasattr(module, "group_matcher"):
        name = getattr(module, "pretrained_cfg", {}).get("architecture") or type(module).__name__
        raise UserError(f"{asked} needs layers, which timm does not define for {name}: {fix}")
    return cast("dict[str, int]", group_parameters(module, module.group_matcher(coarse=False), reverse=True))  # type: ignore[operator]


def matching(module: nn.Module, pattern: str, key: str) -> set[str]:
    """The names of the parameters that *pattern* matches, or that lie in a module that it matches; `UserError` without any.

    A pattern is that of Python's fnmatch, as in timm's lists of what is not decayed: ``*`` stands for any characters, dots
    too. A tied parameter has several names, and goes by the first one.
    """
    first = {parameter: name for name, parameter in module.named_parameters()}
    every = list(module.named_parameters(remove_duplicate=False))
    if found := {first[p] for name, p in every if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}:
        return found
    paths = [".".join(parts[:depth]) for parts in (name.split(".") for name, _ in every) for depth in range(1, len(parts) + 1)]
    near = nearest_paths(pattern, paths)
    raise UserError(f"{key}: {pattern!r} matches no parameter of the model; the nearest names are {near}")


def _numberless(name: str) -> str:
    """``blocks.*.norm1.weight`` for ``blocks.3.norm1.weight``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def group_table(module: nn.Module, config: OptimConfig) -> list[str]:
    """What `settings` decides, as a table: rows for each entry of ``optim.groups``, for the rest, and for what is frozen."""
    chosen = settings(module, config.weight_decay, config.layer_decay, config.groups)
    cells: dict[tuple[int, float], list[str]] = {}
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    for name, setting in chosen.items():
        cells.setdefault((len(config.groups) if setting.rule is None else setting.rule, setting.weight_decay), []).append(name)
    rows = [("match", "rate x", "decay", "tensors", "parameters", "names")]
    for (place, decay), names in sorted(cells.items()):
        rates = {chosen[name].lr_scale for name in names}
        rate = "-".join(f"{one:.3g}" for one in sorted({min(rates), max(rates)}))
        match = config.groups[place].match if place < len(config.groups) else "(the rest)"
        rows.append((match, rate, f"{decay:g}", *_counted(names, sizes)))
    if frozen := [name for name in sizes if name not in chosen]:
        rows.append(("(frozen)", "", "", *_counted(frozen, sizes)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["parameter groups:"] + [
        "  " + "  ".join((match.ljust(widths[0]), *(c.rjust(w) for c, w in zip(numbers, widths[1:])), names))
        for match, *numbers, names in rows
    ]


def _counted(names: list[str], sizes: Mapping[str, int]) -> tuple[str, str, str]:
    """How many tensors *names* are, of how many elements, and the first of the names, those of repeated layers as one."""
    kinds = list(dict.fromkeys(map(_numberless, names)))
    more = f", and {len(kinds) - 4} more" if len(kinds) > 4 else ""
    return str(len(names)), f"{sum(sizes[name] for name in names):,}", ", ".join(kinds[:4]) + more


def _group(params: list[Tensor], names: list[str], lr_scale: float = 1.0, weight_decay: float = 0.0) -> dict[str, Any]:
    return {"params": params, "names": names, "lr_scale": lr_scale, "weight_decay": weight_decay}


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step *step* (from 0) of *steps*, both counted in applied updates: a linear warm-up from 0, then a schedule.

    With lr at the peak, p the share of the steps after the warm-up that is behind, and m = ``min_lr``:

    - constant: lr.
    - cosine: m + (lr - m) (1 + cos(pi p)) / 2 (SGDR without restarts, Loshchilov and Hutter 2017).
    - linear: m + (lr - m) (1 - p).
    - poly: m + (lr - m) (1 - p)**power (DeepLab, Chen et al. 2017).
    - wsd: lr, and over the last ``cooldown`` steps linear in their share, as linear is (MiniCPM, Hu et al. 2024; Hägele et
      al. 2024). A cooldown that would reach into the warm-up begins at its end.
    - step: lr * gamma**k, with k the number of milestones at or before this step (torch's MultiStepLR; He et al. 2016).
    """
    warmup = _steps(config.warmup, steps)
    if step + 1 < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(round(_steps(place, steps)) <= step for place in config.milestones)
    begin = max(warmup, steps - _steps(config.cooldown, steps)) if config.schedule == "wsd" else warmup
    progress = min(1.0, max(0.0, step - begin) / max(1.0, steps - begin))
    span = config.lr - config.min_lr
    if config.schedule == "cosine":
        return config.min_lr + span * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + span * (1.0 - progress) ** (config.power if config.schedule == "poly" else 1.0)


def _steps(value: float, steps: int) -> float:
    """A share of *steps* (below 1) or a number of steps (1 and above), as a number of steps."""
    return value if value >= 1 else value * steps


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig, on_cpu: bool = False) -> Optimizer:
    """Return the optimizer ``optim.name`` over :func:`parameter_groups`; clipping is the engine's.

    adamw (Loshchilov and Hutter 2019) and sgd (with Nesterov momentum) are torch's. lion (Chen et al. 2023), lamb (You et al.
    2020) and adafactor (big_vision's, Zhai et al. 2022) are timm's, muon is :class:`bigvision.muon.Muon`. For parameters
    *on_cpu* adamw is DeepSpeed's vectorised one.
    """
    if config.name == "adamw" and on_cpu:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=config.lr, betas=config.betas, adamw_mode=True)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    if config.name == "sgd":
        momentum = config.momentum
        return torch.optim.SGD(groups, lr=config.lr, momentum=momentum, nesterov=momentum > 0, fused=True)
    if config.name == "muon":
        from bigvision.muon import Muon

        return Muon(groups, lr=config.lr, momentum=config.momentum, betas=config.betas)
    from timm.optim import AdafactorBigVision, Lamb, Lion

    if config.name == "lion":
        # torch 2.11 cannot step sharded tensors together; 2.12 and 2.13 were not tried.
        return Lion(groups, lr=config.lr, betas=config.betas, foreach=torch.__version__ >= "2.14")
    if config.name == "lamb":
        # timm scales only the steps of decayed tensors: without decay it would be Adam.
        always = config.weight_decay == 0
        return Lamb(groups, lr=config.lr, betas=config.betas, max_grad_norm=None, always_adapt=always, foreach=True)
    if config.name == "adafactor":
        momentum, cap = config.betas
        return AdafactorBigVision(
            groups, lr=config.lr, momentum=momentum or None, momentum_dtype=torch.float32, beta2_cap=cap
        )  # fmt: skip
    raise ValueError(f"optim.name: {config.name} has no branch in build_optimizer")


def allocate_state(optimizer: Optimizer) -> None:
    """Create the state that the optimizer's first step would; call it before parameters have values, for they change."""
    if optimizer.state:  # Muon's: a first step would orthogonalise all matrices
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()
    for counter in step_counters(optimizer):
        counter.zero_()


def state_layout(config: OptimConfig, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors that ``optim.name`` keeps of a parameter of *shape*: names, shapes and types.

    One of another shape than the parameter's is a `TypeError`, since a checkpoint could not tell whose share of the parameter
    it is; adafactor's belong to whole matrices.
    """
    shaped = config.name in ("adafactor", "muon")  # what they keep depends on the shape; the others cannot step on meta
    parameter = torch.zeros(shape, device="meta") if shaped else torch.zeros(1, 1)
    optimizer = build_optimizer([_group([parameter], ["one"])], config)
    allocate_state(optimizer)
    layout = {}
    for key, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and key != "step":
            if value.shape != parameter.shape and config.name != "adafactor":
                raise TypeError(f"{type(optimizer).__name__}: {key!r} does not have the parameter's shape and cannot be saved")
            layout[key] = (tuple(value.shape) if shaped else shape, value.dtype)
    return layout


def state_bytes(config: OptimConfig) -> float:
    """Bytes of optimizer state for each number of a large matrix."""
    shape = (1024, 1024)
    return sum(math.prod(kept) * dtype.itemsize for kept, dtype in state_layout(config, shape).values()) / math.prod(shape)


def step_counters(optimizer: Optimizer) -> list[Tensor]:
    """The tensors in which the optimizer counts its steps: in each parameter's state, or one in each group (LAMB)."""
    return [place["step"] for place in (*optimizer.state.values(), *optimizer.param_groups) if "step" in place]
