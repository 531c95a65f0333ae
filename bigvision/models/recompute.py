"""Recompute: which activations of a block are kept for its backward pass, and which are computed again there.

``blocks`` keeps each block's input alone (Chen et al. 2016). ``selective`` keeps what matrix products, convolutions and
attention compute; norms, activations, drops and sums, which are cheap, are computed again. ``budget:X`` keeps those products
that save the most operations for their bytes, so that a block keeps at most the share X of what it keeps without recompute.
Products whose values no backward pass needs are never kept.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from bigvision.config import recompute_budget
from bigvision.errors import UserError
from bigvision.models.blocks import Block, kinds
from bigvision.models.drop_path import SkippedBranches
from bigvision.models.tracing import FusedAttention, Key, OpCounter, attributes_kept, computes_products, first_line, product

KEPT_THROUGH_HOOKS = "respect_saved_tensors_hooks"
"""An argument of torch's checkpoint; older ones would hand it on to the block."""
MOST_SUBSETS = 12
"""Products of a block among which the best choice is looked for; with more, they are taken by operations for a byte."""


def recompute_blocks(
    blocks: Sequence[nn.Module], recompute: str, model: nn.Module, image_shape: tuple[int, int, int],
    branches: SkippedBranches | None = None, offloaded: bool = False,
) -> None:  # fmt: skip
    """Let each of *blocks* of *model*, on meta, compute activations again as ``parallel.recompute`` says, in place.

    *image_shape*: channels, height and width. The second pass keeps the samples that the first one drew for *branches*.
    *offloaded*: what is kept goes through hooks of autograd around the blocks, which are not compiled.
    """
    if recompute == "none":
        return
    kept = choose_kept(blocks, recompute, model, image_shape)
    for block in blocks:
        norms = [module for module in block.modules() if isinstance(module, BatchNorm)]
        for module in block.modules() if kept[block] else ():
            if getattr(module, "inplace", False):  # it would change a kept value
                module.inplace = False  # type: ignore[assignment]
        options: dict[str, Any] = {}
        if kept[block] and offloaded:
            if KEPT_THROUGH_HOOKS not in inspect.signature(checkpoint).parameters:
                raise UserError(
                    f"parallel.recompute: {recompute} and parallel.offload: activations need torch 2.14 or newer together: use "
                    "parallel.recompute: blocks"
                )
            options[KEPT_THROUGH_HOOKS] = True
        if kept[block] or norms or branches is not None:
            options["context_fn"] = functools.partial(_contexts, kept[block], tuple(norms), branches)
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)


def _contexts(
    kept: frozenset[Key], norms: tuple[BatchNorm, ...], branches: SkippedBranches | None
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:  # fmt: skip
    """What surrounds the first pass, and the second one."""
    first, second = nullcontext(), nullcontext()
    if kept:
        first, caching = create_selective_checkpoint_contexts(functools.partial(_policy, kept))
        second = _SecondPass(None, caching.storage)
    again = [_statistics_held(norms)] if norms else []
    again += [branches.using(branches.drawn)] if branches is not None else []
    return first, _both(*again, second) if again else second


class _SecondPass(_CachedTorchDispatchMode):
    """Takes kept results in the order of their calls.

    Other operations need not be those of the first pass: DeepSpeed gathers weights in both, at other places.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not computes_products(func):
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def _both(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def _policy(kept: frozenset[Key], context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    key = product(func, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if key in kept else CheckpointPolicy.PREFER_RECOMPUTE


@contextmanager
def _statistics_held(norms: Sequence[BatchNorm]) -> Iterator[None]:
    """Undo what a second pass does to the running statistics, which the first one has moved already."""
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before):
            # Not a change for autograd: the backward pass holds on to the buffers and does not use their values.
            buffer.data.copy_(value)


# The choice.


@dataclass
class Call:
    """An operation of a block's forward pass."""

    key: Key | None
    flops: float
    inputs: set[int]
    """Memory that it reads and writes, by the numbers of storages."""
    outputs: set[int]
    bytes: int


def choose_kept(
    blocks: Sequence[nn.Module], recompute: str, model: nn.Module, image_shape: tuple[int, int, int]
) -> dict[nn.Module, frozenset[Key]]:  # fmt: skip
    """The products that each of *blocks* of *model*, on meta, keeps: for blocks of one kind the same, or one of two choices."""
    found = dict.fromkeys(blocks, frozenset[Key]())
    if (budget := recompute_budget(recompute)) is None:
        return found
    groups = kinds(blocks)
    inputs = _inputs([group[0] for group in groups], model, image_shape)
    for group in groups:
        if group[0] in inputs:
            found.update(zip(group, shared_out(choices(*_rehearsed(group[0], *inputs[group[0]])), budget, len(group))))
    return found


def kept_by_path(
    blocks: Sequence[Block], recompute: str, model: nn.Module, image_shape: tuple[int, int, int]
) -> dict[str, frozenset[Key]]:  # fmt: skip
    """The same by the blocks' paths; empty where nothing is computed again."""
    if recompute == "none":
        return {}
    kept = choose_kept([block.module for block in blocks], recompute, model, image_shape)
    return {block.path: kept[block.module] for block in blocks}


class _Stop(Exception):
    pass


def _inputs(
    blocks: Sequence[nn.Module], model: nn.Module, image_shape: tuple[int, int, int]
) -> dict[nn.Module, tuple[Any, Any]]:  # fmt: skip
    """What *model*, on meta, calls each of *blocks* with."""
    found: dict[nn.Module, tuple[Any, Any]] = {}

    def called(block: nn.Module, args: Any, kwargs: Any) -> None:
        found[block] = args, kwargs
        if len(found) == len(blocks):
            raise _Stop

    hooks = [block.register_forward_pre_hook(called, with_kwargs=True) for block in blocks]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), attributes_kept(model):
            model(torch.empty(2, *image_shape, device="meta"))
    except _Stop:
        pass
    except Exception as error:
        what = f"parallel.recompute: this model's products cannot be listed on meta ({first_line(error)})"
        raise UserError(f"{what}: use blocks or none") from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Calls(OpCounter):
    """Records the operations of a block's forward pass, and which memory each reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.alive: list[Tensor] = []  # memory that is freed would be given to others
        self.fused = 0.0

    def attention(self, flops: float, moved: Sequence[float], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.fused += flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.flops + self.fused
        result = super().__torch_dispatch__(func, types, args, kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.alive += read + made
        inputs, outputs = {storage(one) for one in read}, {storage(one) for one in made}
        nbytes = sum({storage(one): one.untyped_storage().nbytes() for one in made if storage(one) not in inputs}.values())
        key = product(func, args, kwargs or {})
        self.calls.append(Call(key, self.flops + self.fused - before, inputs, outputs, nbytes))
        return result


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _rehearsed(block: nn.Module, args: Any, kwargs: Any) -> tuple[list[Call], dict[int, int], set[int]]:
    """(the operations of a forward pass of *block*, bytes of each memory that autograd keeps for the backward pass, the memory
    of the inputs)."""
    saved: dict[int, int] = {}
    given = tree_map(lambda one: one.detach().requires_grad_() if _real(one) else one, (args, kwargs))
    weights = {storage(one) for one in (*block.parameters(), *block.buffers())}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        saved[storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    attention, recorded = FusedAttention("cuda"), _Calls()
    attention.counter = recorded
    with torch.random.fork_rng(devices=[]), recorded, attention, saved_tensors_hooks(pack, lambda one: one):
        block(*given[0], **given[1])
    entered = {storage(one): one.untyped_storage().nbytes() for one in tree_leaves(given) if isinstance(one, Tensor)}
    for call in recorded.calls:  # copies of weights in the compute type are no activations
        if call.inputs and call.inputs <= weights:
            weights |= call.outputs
    for weight in weights | entered.keys():
        saved.pop(weight, None)
    return recorded.calls, saved | entered, set(entered)


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@dataclass(frozen=True)
class Choice:
    """Products that a block may keep."""

    kept: frozenset[Key]
    share: float
    """Bytes that are kept with the block's input, as a share of those without recompute."""
    flops: float
    """Operations of products that are computed again."""


def choices(calls: Sequence[Call], saved: dict[int, int], given: set[int]) -> list[Choice]:
    """Those of which none is both larger and slower than another, by their size.

    *saved*: bytes of each memory that is kept without recompute; that of the inputs *given* is kept in any case.
    """
    whole, least, wanted = sum(saved.values()), sum(saved[one] for one in given), saved.keys() - given
    keys = sorted({call.key for call in calls if call.key is not None} & _needed(calls, wanted))
    cost = {key: [0.0, 0] for key in keys}
    for call in calls:
        if call.key in cost:
            cost[call.key][0] += call.flops
            cost[call.key][1] += call.bytes
    keys.sort(key=lambda key: cost[key][0] / max(1, cost[key][1]), reverse=True)
    if len(keys) <= MOST_SUBSETS:
        subsets = [one for count in range(len(keys) + 1) for one in itertools.combinations(keys, count)]
    else:
        subsets = [tuple(keys[:count]) for count in range(len(keys) + 1)]
    found = []
    for subset in subsets:
        nbytes = least + sum(cost[key][1] for key in subset)
        found.append(Choice(frozenset(subset), nbytes / max(1, whole), _second_pass(calls, wanted, frozenset(subset))))
    found.sort(key=lambda one: (one.share, one.flops))
    best = [min(one.flops for one in found[: number + 1]) for number in range(len(found))]
    return [one for number, one in enumerate(found) if number == 0 or one.flops < best[number - 1]]


def shared_out(found: Sequence[Choice], budget: float, count: int) -> list[frozenset[Key]]:
    """What each of *count* equal blocks keeps, so that all together keep at most *budget* and compute the least again."""
    plans: list[tuple[float, int, Choice, Choice]] = [(count * found[0].flops, 0, found[0], found[0])]
    for small, large in itertools.combinations_with_replacement(found, 2):
        if small.share <= budget:
            extra = large.share - small.share
            many = min(count, int(count * (budget - small.share) / extra + 1e-9)) if extra > 0 else 0
            plans.append(((count - many) * small.flops + many * large.flops, many, small, large))
    _, many, small, large = min(plans, key=lambda plan: plan[:2])
    # Those that keep more lie evenly among the others.
    return [large.kept if (n + 1) * many // count > n * many // count else small.kept for n in range(count)]


def _walk(calls: Sequence[Call], wanted: set[int], kept: frozenset[Key]) -> Iterator[tuple[Call, bool]]:
    """The calls whose results the second pass needs, from the last to the first, and whether each is kept."""
    needed = set(wanted)
    for call in reversed(calls):
        if not needed & call.outputs:
            continue
        if call.key in kept and not call.inputs & call.outputs:
            needed -= call.outputs
            yield call, True
        else:
            needed |= call.inputs
            yield call, False


def _needed(calls: Sequence[Call], wanted: set[int]) -> set[Key | None]:
    return {call.key for call, _ in _walk(calls, wanted, frozenset())}


def _second_pass(calls: Sequence[Call], wanted: set[int], kept: frozenset[Key]) -> float:
    """Operations that are computed again."""
    return sum(call.flops for call, is_kept in _walk(calls, wanted, kept) if not is_kept)
