"""Parameter groups, optimizers and learning-rate schedules."""

from bigvision.optim.optimizers import (
    allocate_state,
    build_optimizer,
    learning_rate,
    parameter_groups,
    state_layout,
    step_counters,
)

__all__ = ["allocate_state", "build_optimizer", "learning_rate", "parameter_groups", "state_layout", "step_counters"]
