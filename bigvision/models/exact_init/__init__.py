"""First values that are bit for bit those of a normal timm build, on any rank, one tensor at a time.

The door is `construct`: in comes a function that builds a module; out come the module on meta and its `FirstValues`, which give
any of its tensors its value. `given` does the same for a module that has its values, `computed` for a function of tensors (a
filter of timm's for pretrained weights). The constructor runs once on the meta device and leaves an *init trace*: its tensor
operations in order. Each rank *replays* on the CPU those that give the tensors it holds. docs/exact_init.md explains it all.

Read ``first_values.py`` first (the door), then ``trace.py`` (how a trace is recorded and replayed), which is used only here.
"""

from bigvision.models.exact_init.first_values import FirstValues, computed, construct, given
from bigvision.models.exact_init.trace import NotRecordable

__all__ = ["FirstValues", "NotRecordable", "computed", "construct", "given"]
