"""The model card that timm writes next to weights, so that timm and other tools open a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import nn

from bigvision.config import ModelConfig


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
