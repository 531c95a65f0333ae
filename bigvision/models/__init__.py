"""timm models: built on meta, with exact first values on demand, and divided into blocks."""

from bigvision.models.arguments import GivenModel, check_model, given_card, given_name
from bigvision.models.blocks import Block, Blocks, find_blocks, kinds, share_rates, trace
from bigvision.models.build import Blueprint, blueprint, model_card

__all__ = [
    "Block",
    "Blocks",
    "Blueprint",
    "GivenModel",
    "blueprint",
    "check_model",
    "find_blocks",
    "given_card",
    "given_name",
    "kinds",
    "model_card",
    "share_rates",
    "trace",
]
