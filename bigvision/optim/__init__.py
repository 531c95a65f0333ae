"""Parameter groups, optimizers and learning-rate schedules.

In come a model's parameters by name and the section ``optim``; out come parameter groups, an optimizer of torch's, timm's or
DeepSpeed's over them, and the learning rate of a step. All of it is in ``optimizers.py``; clipping and stepping are the
engine's.
"""

from bigvision.optim.optimizers import (
    allocate_state,
    build_optimizer,
    learning_rate,
    parameter_groups,
    state_layout,
    step_counters,
)

__all__ = ["allocate_state", "build_optimizer", "learning_rate", "parameter_groups", "state_layout", "step_counters"]
