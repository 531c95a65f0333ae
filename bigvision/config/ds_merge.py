"""What a DeepSpeed file asks for, set beside the configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from bigvision.config.ds_file import DsFile
from bigvision.config.schema import Config
from bigvision.config.values import coerce, get, spell
from bigvision.errors import UserError

UNDECIDED = ("train.micro_batch", "train.steps")
"""Keys whose null leaves the value open."""


def merge(file: DsFile, config: Config, origins: Mapping[str, str], firm: set[str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ours that take the file's value.

    *origins* says where *config* got the keys that are not defaults. The file replaces defaults and the strategy, unless that
    is one of the keys in *firm*; every other key has to agree with the file.

    Raises:
        UserError: the file contradicts the configuration.
    """
    strategy = config.parallel.strategy
    if "parallel.strategy" not in file.asked and not strategy.startswith("zero"):
        where = origins.get("parallel.strategy", "default")
        raise UserError(
            f'{file.path}: zero_optimization.stage: "auto" takes parallel.strategy: {strategy} ({where}), which is not ZeRO: '
            "use zero1, zero2 or zero3"
        )
    taken: dict[str, Any] = {}
    for key, (asked, json_key) in file.asked.items():
        value, ours = coerce(asked, kinds[key], key, file.path), get(config, key)
        decided = key in origins and not (ours is None and key in UNDECIDED)
        if ours in file.also.get(key, ()):
            continue
        if key == "train.steps" and not decided and "train.epochs" in origins:
            raise _contradiction(file, json_key, "train.epochs", config, origins)
        if not decided or (key == "parallel.strategy" and key not in firm):
            taken[key] = value
        elif ours != value and not (key == "optim.warmup" and _warmup_steps(config, file) == value):
            raise _contradiction(file, json_key, key, config, origins)
    return taken


def _warmup_steps(config: Config, file: DsFile) -> float | None:
    """Our warm-up as a number of steps, where that is known; the same up to rounding is the same."""
    steps = config.train.steps or file.asked.get("train.steps", (None, ""))[0]
    if config.optim.warmup >= 1 or not steps:
        return None
    count = config.optim.warmup * steps
    return float(round(count)) if math.isclose(count, round(count)) else count


def _contradiction(file: DsFile, json_key: str, key: str, config: Config, origins: Mapping[str, str]) -> UserError:
    value = json.dumps(file.said[json_key])
    return UserError(
        f"{file.path}: {json_key}: {value} contradicts {key}: {spell(get(config, key))} ({origins[key]}): "
        'make them equal, or write "auto" in the file'
    )
