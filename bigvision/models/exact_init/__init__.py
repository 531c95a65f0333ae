"""First values that are bit for bit those of a normal timm build, on any rank, one tensor at a time.

A constructor runs once on the meta device while its tensor operations are recorded; each rank replays on the CPU those that
give the tensors it holds. docs/exact_init.md explains why and how. Read in this order:

- ``first_values``: a module on meta and `FirstValues`, which gives its tensors their values;
- ``recording``: what is kept of an operation, and which operations a storage needs;
- ``record``: how a constructor is run on meta, and what cannot be recorded;
- ``replay``: how random numbers come out the same when only some operations are performed;
- ``attributes``: tensors that are neither parameters nor buffers.
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
