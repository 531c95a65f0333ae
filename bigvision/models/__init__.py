"""timm models: built on meta, with exact values on demand, and cut into blocks."""

from bigvision.models.blocks import Block, Blocks, find_blocks, trace
from bigvision.models.build import Blueprint, blueprint
from bigvision.models.card import model_card
from bigvision.models.check import check_model
from bigvision.models.partition import Fits
from bigvision.models.stages import Stage, StagePlan, plan_stages

__all__ = [
    "Block",
    "Blocks",
    "Blueprint",
    "Fits",
    "Stage",
    "StagePlan",
    "blueprint",
    "check_model",
    "find_blocks",
    "model_card",
    "plan_stages",
    "trace",
]
