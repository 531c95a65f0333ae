"""Pipeline stages: a traced model is cut between blocks, and each stage runs under a schedule of torch's.

In come a model on meta, its blocks and what a stage may need of memory; out come a plan (which blocks each stage has), stages
as modules, and a schedule of ``torch.distributed.pipelining`` over them.

Read in this order: ``stages.py`` (what a stage is, and where to cut), ``cutting.py`` (what crosses a cut), ``schedules.py``
(which rank has which stage, when it runs, and what it needs of its device).
"""

from bigvision.pipeline.schedules import Placement, StageMemory, make_schedule
from bigvision.pipeline.stages import Stage, StagePlan, plan_stages

__all__ = ["Placement", "Stage", "StageMemory", "StagePlan", "make_schedule", "plan_stages"]
