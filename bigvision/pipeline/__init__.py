"""Pipeline stages: a traced model is cut between blocks, and each stage runs under a schedule of torch's.

Read in this order: ``stages`` (the plan and what a stage is), ``balance`` (where to cut), ``cutting`` (what crosses a cut),
``schedules`` (which rank has which stage, and when it runs).
"""

from bigvision.pipeline.balance import Fits
from bigvision.pipeline.schedules import Placement, make_schedule
from bigvision.pipeline.stages import Stage, StagePlan, plan_stages

__all__ = ["Fits", "Placement", "Stage", "StagePlan", "make_schedule", "plan_stages"]
