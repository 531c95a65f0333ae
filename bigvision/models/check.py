"""What can be known to be wrong about a model before anything is built."""

from __future__ import annotations

import timm
from timm.models import get_arch_pretrained_cfgs, is_model, split_model_name_tag

from bigvision.config import ModelConfig
from bigvision.errors import UserError, nearest
from bigvision.models.arguments import image_size
from bigvision.models.given import PREFIX, GivenModel, check_given
from bigvision.models.weights_file import WeightsFile


def check_model(config: ModelConfig, model: GivenModel | None = None) -> None:
    """Raise `UserError` for an unknown model name or a weights file that cannot be read. Builds nothing, reads only headers."""
    if model is not None:
        check_given(config, model)
    else:
        check_name(config.name)
    if config.weights is not None and config.pretrained:
        raise UserError(f"model.weights: {config.weights} and model.pretrained: true exclude each other; keep one")
    if config.weights is not None:
        WeightsFile(config.weights, "model.weights")
    elif config.pretrained:
        architecture, _ = split_model_name_tag(config.name)
        if not any(card.has_weights for card in get_arch_pretrained_cfgs(architecture).values()):
            raise UserError(f"model.pretrained: timm has no weights for {config.name}; use false")
    if (size := image_size(config)) is not None and min(size) < 1:
        raise UserError(f"model.image_size: {config.image_size} is not a size in pixels; give a positive number, or two")
    if not 0.0 <= config.drop_path < 1.0:
        raise UserError(f"model.drop_path: {config.drop_path} is not a rate; give a number from 0 up to 1")


def check_name(name: str) -> None:
    """Raise `UserError` unless `name` is one of timm's, with or without a weights tag."""
    if name.startswith(PREFIX):
        raise UserError(
            f"model.name: the model of this run was given from Python ({name.removeprefix(PREFIX)}): give it again, with "
            "bigvision.train(..., model=...); no command can build it"
        )
    architecture, tag = split_model_name_tag(name)
    if "/" in name or ":" in name or not is_model(architecture):
        raise UserError(f"model.name: {name!r} is not a timm model{nearest(architecture, timm.list_models())}")
    if tag and not any(card.tag == tag for card in get_arch_pretrained_cfgs(architecture).values()):
        tags = [f"{architecture}.{card.tag}" for card in get_arch_pretrained_cfgs(architecture).values() if card.tag]
        raise UserError(f"model.name: timm has no weights {name!r}{nearest(name, tags) or f'; use {architecture!r}'}")
