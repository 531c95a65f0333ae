"""The model section of a run configuration, for tests."""

from __future__ import annotations

from bigvision.config import ModelConfig as Model

__all__ = ["TINY", "Model"]

TINY = {"patch_size": 8, "depth": 5, "embed_dim": 48, "num_heads": 3}
