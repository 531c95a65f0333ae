"""timm models: built on meta, with exact first values on demand, and divided into blocks."""

from bigvision.models.blocks import Block, Blocks, find_blocks, trace
from bigvision.models.build import Blueprint, blueprint
from bigvision.models.card import model_card
from bigvision.models.check import check_model
from bigvision.models.given import GivenModel, given_card, given_name
from bigvision.models.rates import kinds, share_rates

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
