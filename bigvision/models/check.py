"""What can be known to be wrong about a model before anything is built."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import timm
from timm.models import get_arch_pretrained_cfgs, is_model, split_model_name_tag

from bigvision.config import ModelConfig
from bigvision.errors import UserError, either, nearest
from bigvision.models.arguments import image_size
from bigvision.models.given import PREFIX, GivenModel, check_given
from bigvision.models.weights_file import WeightsFile


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


HUB = ("hf-hub:timm/", "hf_hub:timm/", "timm/")
"""Before the name of timm's repositories in the Hugging Face hub, which are called NAME.TAG."""


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
