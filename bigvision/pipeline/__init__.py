"""Pipeline stages: a traced model is cut between blocks, and each stage runs under a schedule of torch's.

Read in this order: ``stages`` (what a stage is, and the plan), ``cutting`` (what crosses a cut), ``balance`` (where to
cut), ``schedules`` (which rank has which stage, and when it runs), ``memory`` (what a stage needs of its device).
"""

from bigvision.pipeline.schedules import Placement, StageMemory, make_schedule
from bigvision.pipeline.stages import Stage, StagePlan, plan_stages

__all__ = ["Placement", "Stage", "StageMemory", "StagePlan", "make_schedule", "plan_stages"]
