"""What training programs put before and into the names of a model's tensors, and which of it a model's own names lack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from bigvision.errors import UserError, either

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Components that torch.compile, recomputation and FSDP put anywhere into a name."""
COUNTERS = ("n_averaged",)
"""What `torch.optim.swa_utils.AveragedModel` keeps beside a model."""
DEEPEST = 5
"""Components that a prefix may have, as ``module.model.teacher.backbone.``"""


def plain_name(name: str) -> str:
    """*name* without the components of `WRAPPERS`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def find_prefix(names: Iterable[str], expected: Collection[str], where: str, choose: str) -> str:
    """The prefix under which *names* has all those that a model needs (*expected*); "" where there is none.

    Names that only a filter of timm's understands never match all, and are left to it.

    Args:
        where: begins the error, such as ``model.weights: FILE``.
        choose: how a prefix is named, such as ``FILE?prefix=``.

    Raises:
        UserError: several prefixes fit alike, as those of a student and a teacher.
    """
    matches: Counter[str] = Counter()
    for name in names:
        rest, prefix = name, ""
        for _ in range(DEEPEST + 1):
            matches[prefix] += rest in expected
            head, dot, rest = rest.partition(".")
            if not dot:
                break
            prefix += head + dot
    alike = sorted(prefix for prefix, count in matches.items() if count == len(expected))
    if not alike or "" in alike:
        return ""
    if len(alike) > 1:
        raise UserError(f"{where} has the model's tensors under {either(alike)}: choose one, such as {choose}{alike[-1]}")
    return alike[0]
