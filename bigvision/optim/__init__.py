"""Parameter groups, optimizers and learning-rate schedules."""

from bigvision.optim.groups import parameter_groups
from bigvision.optim.optimizers import allocate_state, build_optimizer, state_layout, step_counters
from bigvision.optim.schedules import learning_rate

__all__ = ["allocate_state", "build_optimizer", "learning_rate", "parameter_groups", "state_layout", "step_counters"]
