"""The model section of a run configuration, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Model:
    name: str = "vit_tiny_patch16_224"
    pretrained: bool = False
    weights: str | None = None
    image_size: int | tuple[int, int] | None = None
    num_classes: int | None = None
    drop_path: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


TINY = {"patch_size": 8, "depth": 5, "embed_dim": 48, "num_heads": 3}
