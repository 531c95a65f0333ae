"""Which model ``task.teacher`` means: one of timm's with pretrained weights, or what a run or an export has saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import timm

from bigvision.config import ModelConfig
from bigvision.errors import UserError
from bigvision.models.arguments import check_model, current_name

OWN_KEYS = ("img_size", "num_classes", "drop_path_rate", "drop_rate")
"""Arguments of a timm constructor that are no options: they have keys of their own, or are for training."""


class TeacherModel(NamedTuple):
    """A model, and what is known of its classes and its images."""

    config: ModelConfig
    outputs: int
    classes: list[str] | None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def find_teacher(source: str) -> TeacherModel:
    """The model that *source* means. Builds nothing, and reads only headers; `UserError` where there is none."""
    path = Path(source).expanduser()
    if not path.exists() and timm.is_model(current_name(source)[0].partition(".")[0]):
        config = ModelConfig(name=source, pretrained=True)
        try:
            check_model(config)
        except UserError as error:
            raise UserError(f"task.teacher: {source}: {error}") from error
        card = timm.models.get_pretrained_cfg(current_name(source)[0])
        return TeacherModel(config, card.num_classes if card is not None else 0, None)
    folder = path if path.is_dir() else path.parent
    try:
        card = json.loads((folder / "config.json").read_bytes())
        name, outputs, images = card["architecture"], card["num_classes"], card["pretrained_cfg"]
        options = {key: value for key, value in card.get("model_args", {}).items() if key not in OWN_KEYS}
        size = tuple(images["input_size"][1:])
        config = ModelConfig(name=name, weights=source, image_size=size, options=options)
        known = TeacherModel(config, outputs, card.get("label_names"), tuple(images["mean"]), tuple(images["std"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"task.teacher: {source} is neither a timm model nor weights with timm's config.json beside them: name a step "
            "folder of a run, such as OUT/step-00000100, or a folder that bigvision export wrote"
        ) from None
    try:
        check_model(config)
    except UserError as error:
        raise UserError(f"task.teacher: {source}: {error}") from error
    return known
