"""First values that are bit for bit those of a normal timm build, on any rank, one tensor at a time.

In comes a function that builds a module; out come the module on meta and `FirstValues`, which gives any of its tensors its
value. The constructor runs once on the meta device while its tensor operations are recorded; each rank replays on the CPU those
that give the tensors it holds. docs/exact_init.md explains why and how. Read in this order:

- ``first_values.py``: building a module on meta, `FirstValues`, and tensors in plain attributes;
- ``record.py``: how a constructor is run on meta, and what cannot be recorded;
- ``recording.py``: what is kept of an operation, which operations a storage needs, and how random numbers come out the same
  when only some operations are performed.
"""

from bigvision.models.exact_init.first_values import Attribute, FirstValues, construct, named_tensors, plain_attributes
from bigvision.models.exact_init.recording import NotRecordable, Recording, ReplayDiffers, View

__all__ = [
    "Attribute",
    "FirstValues",
    "NotRecordable",
    "Recording",
    "ReplayDiffers",
    "View",
    "construct",
    "named_tensors",
    "plain_attributes",
]
