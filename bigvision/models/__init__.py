"""timm models: built on meta, with exact values on demand, and cut into blocks."""

from bigvision.models.blocks import Block, Blocks, find_blocks, trace
from bigvision.models.build import Blueprint, blueprint
from bigvision.models.card import model_card
from bigvision.models.check import check_model
from bigvision.models.given import GivenModel, given_card, given_name
from bigvision.models.partition import Fits
from bigvision.models.stages import Stage, StagePlan, plan_stages

__all__ = [
    "Block",
    "Blocks",
    "Blueprint",
    "Fits",
    "GivenModel",
    "Stage",
    "StagePlan",
    "blueprint",
    "check_model",
    "find_blocks",
    "given_card",
    "given_name",
    "model_card",
    "plan_stages",
    "trace",
]
