"""Targets of any task: tensors, or dicts, lists and tuples of them. Loader, batches and tasks all handle them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Targets = Any
"""What samples are to be learned to give: a tensor (B, ...), a dict, list or tuple of such, or None where a task has none."""


def stack(targets: Sequence[Any]) -> Targets:
    """The targets of samples as those of a batch: numbers and tensors are stacked, None stays None."""
    first = targets[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {name: stack([target[name] for target in targets]) for name in first}
    if isinstance(first, (list, tuple)):
        return _like(first, [stack(part) for part in zip(*targets, strict=True)])
    if isinstance(first, (Tensor, np.ndarray)):
        return torch.stack([torch.as_tensor(target) for target in targets])
    return torch.tensor(targets)


def each_tensor(change: Callable[[Any], Any], targets: Targets) -> Targets:
    """*targets* with *change* done to every tensor or array in them."""
    if isinstance(targets, dict):
        return {name: each_tensor(change, part) for name, part in targets.items()}
    if isinstance(targets, (list, tuple)):
        return _like(targets, [each_tensor(change, part) for part in targets])
    return change(targets) if isinstance(targets, (Tensor, np.ndarray)) else targets


def concatenate(targets: Sequence[Targets]) -> Targets:
    """The targets of consecutive batches as those of one."""
    first = targets[0]
    if isinstance(first, dict):
        return {name: concatenate([target[name] for target in targets]) for name in first}
    if isinstance(first, (list, tuple)):
        return _like(first, [concatenate(part) for part in zip(*targets, strict=True)])
    return torch.cat(list(targets)) if isinstance(first, Tensor) else first


def _like(first: Any, parts: list[Any]) -> Any:
    """*parts* in the kind of list or tuple, perhaps a named one, that *first* is."""
    return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
