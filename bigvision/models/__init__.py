"""timm models: built on meta, with exact first values on demand, and divided into blocks.

In come the section ``model`` of a configuration, or a module of the user's; out come a `Blueprint` (the module on meta, the
values of its tensors, what its images are like) and `Blocks`.

Read ``build.py`` first, then ``blocks.py``. ``exact_init`` gives first values, ``weights.py`` and ``weights_file.py``
pretrained ones, ``teacher.py`` the model to learn from. ``drop_path.py`` makes stochastic depth leave work out, in the branches
that ``branches.py`` finds. ``tracing.py`` finds and prices the parts of a model, ``formats.py`` makes it compute in bf16, fp16
or channels_last, ``arguments.py`` checks what was asked for, ``convert.py`` is a command.
"""

from bigvision.models.arguments import GivenModel, check_model, given_card, given_name
from bigvision.models.blocks import Block, Blocks, find_blocks, kinds, share_rates, trace
from bigvision.models.branches import dropping, rates_of_branches
from bigvision.models.build import Blueprint, blueprint, model_card
from bigvision.models.drop_path import SkippedBranches, kept_samples
from bigvision.models.teacher import find_teacher
from bigvision.models.tracing import training_flops
from bigvision.models.weights import classifier_layers

__all__ = [
    "Block",
    "Blocks",
    "Blueprint",
    "GivenModel",
    "SkippedBranches",
    "blueprint",
    "check_model",
    "classifier_layers",
    "dropping",
    "find_blocks",
    "find_teacher",
    "given_card",
    "given_name",
    "kept_samples",
    "kinds",
    "model_card",
    "rates_of_branches",
    "share_rates",
    "trace",
    "training_flops",
]
