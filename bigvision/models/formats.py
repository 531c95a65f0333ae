"""Models that compute in another format than that of their weights: in bf16 or fp16, under autocast, in channels_last.

Master weights, gradient accumulation and reduction, and moments are always fp32. Frozen weights may be held in bf16.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase as BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bigvision.errors import UserError
from bigvision.models.alike import equal_run_once
from bigvision.models.tracing import first_line

COMPUTE_DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "amp_bf16": torch.bfloat16, "fp8": torch.bfloat16,
}  # fmt: skip
"""What is computed in by ``parallel.precision``; with fp8 some linear layers round further (`float8.py`)."""
PRODUCTS: set[Any] = {
    F.linear, F.bilinear, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.mm, torch.bmm, torch.einsum,
    torch.addmm, torch.baddbmm, torch.conv_transpose1d, torch.conv_transpose2d, F.scaled_dot_product_attention,
    Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm,
}  # fmt: skip
"""Functions whose tensors must be of one type. CUDA refuses an attention mask of another type than the query's as well."""

FP32_ALONE = (BatchNorm, nn.RNNBase)
"""Modules whose frozen weights stay fp32: beside fp32 statistics, or read from a list of them and not by name."""
CAST_BUFFERS = ("attn_mask", "filt", "k_bias")
"""Buffers that are multiplied with, concatenated to or masked over what is computed (of Swin, TResNet, BEiT and EVA), and so
are read in the compute type. All others (running statistics, rotary and coordinate tables) stay in fp32."""


def compute_in(
    parts: Iterable[nn.Module], blocks: Iterable[nn.Module], dtype: torch.dtype | None, channels_last: bool = False,
    cast_weights: bool = True, norms: bool = False,
) -> None:  # fmt: skip
    """Let *parts* of a model compute in *dtype* from fp32 weights, without autocast; in place, and names do not change.

    Weights are cast where a module reads them, inside autograd: parameters and their accumulated gradients stay fp32. The
    innermost modules with weights cast what they are given. BatchNorm keeps fp32 weights beside its fp32 statistics. A block
    without BatchNorm is given its input in fp32, so that what its branches are added to is not rounded again and again: over 24
    blocks the gradients would be 1.7 times as far from fp32's as autocast's are; with it they are 1.05 to 1.25 times as far
    (tests/engine/test_precision.py).

    Args:
        dtype: None computes in fp32, or as autocast decides; weights that are held in bf16 are then read as fp32.
        channels_last: lay out the weights of convolutions so for computing; what is stored stays row-major.
        cast_weights: False where the strategy casts them itself (FSDP, at the gather).
        norms: let BatchNorm read its weights as fp32 in any case.
    """
    chosen = set(blocks)
    for module in [module for part in parts for module in part.modules()]:
        names = tuple(name for name, weight in module._parameters.items() if weight is not None)
        norm = isinstance(module, BatchNorm)
        # A linear layer is innermost also where an adapter lies in it.
        lone = isinstance(module, nn.Linear) or not any(True for child in module.children() for _ in child.parameters())
        innermost = bool(names) and lone
        normed = any(isinstance(part, BatchNorm) for part in module.modules())
        weights = torch.float32 if norm and (norms or dtype) else dtype if cast_weights else None
        if dtype is None and any(module._parameters[name].dtype == torch.bfloat16 for name in names):  # type: ignore[union-attr]
            weights = torch.float32  # see `hold_frozen`
        weights = weights if names else None
        entry = dtype if innermost else torch.float32 if dtype is not None and module in chosen and not normed else None
        layout = channels_last and isinstance(module, nn.Conv2d)
        buffers = tuple(name for name in CAST_BUFFERS if dtype is not None and module._buffers.get(name) is not None)
        if weights is not None or entry is not None or layout or buffers:
            module.__class__ = _computing(type(module), names, weights, entry, dtype, layout, buffers)  # type: ignore[assignment]


@functools.cache
def _computing(
    kind: type[nn.Module], names: tuple[str, ...], weights: torch.dtype | None, entry: torch.dtype | None,
    dtype: torch.dtype | None, channels_last: bool, buffers: tuple[str, ...],
) -> type[nn.Module]:  # fmt: skip
    """A subclass of *kind* whose parameters *names* read as *weights* and *buffers* as *dtype*, and which is given its first
    argument as *entry*; where that is *dtype*, all of them. Not hooks, so that torch.compile sees equal blocks as equal."""

    def reader(name: str) -> property:
        def read(module: nn.Module) -> Tensor | None:
            value = module._parameters[name]
            if value is None or isinstance(value, DTensor):  # sharded: only FSDP itself asks for it
                return value
            if channels_last and value.ndim == 4:
                return value.to(dtype=weights or value.dtype, memory_format=torch.channels_last)
            return value if weights is None else value.to(weights)

        return property(read)

    members: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    if weights is not None or channels_last:
        members |= {name: reader(name) for name in names}
    members |= {name: property(lambda module, name=name: module._buffers[name].to(dtype)) for name in buffers}
    if entry is not None:

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            args = tuple(_cast(value, entry) for value in args)
            return kind.forward(self, *args, **{name: _cast(value, entry) for name, value in kwargs.items()})

        def call(self: nn.Module, first: Any, *others: Any, **kwargs: Any) -> Any:
            return kind.__call__(self, _cast(first, entry), *others, **kwargs)

        # A block's input is cast outside of its forward, which may be compiled: the first block's is of another type.
        members |= {"forward": forward} if entry == dtype else {"__call__": call}
    return type(kind.__name__, (kind,), members)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    return type(value)(_cast(item, dtype) for item in value) if type(value) in (list, tuple) else value


class OneType(TorchFunctionMode):
    """Raises `RuntimeError`, as torch does, where tensors of several types would be multiplied."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PRODUCTS:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            kinds = {tensor.dtype for tensor in tensors if tensor.dtype != torch.bool}
            if len(kinds) > 1:
                raise RuntimeError(f"{getattr(func, '__name__', func)} of {' and '.join(sorted(map(str, kinds)))}")
        return func(*args, **kwargs)


def why_not(
    module: nn.Module, blocks: Sequence[nn.Module], image_shape: tuple[int, int, int], dtype: torch.dtype, residual: bool = True
) -> str | None:  # fmt: skip
    """Why *module*, on meta, with these *blocks* cannot compute in *dtype* by :func:`compute_in`; None where it can. Nothing is
    computed. *residual*: the blocks are given their inputs in fp32."""
    paths = {id(part): path for path, part in module.named_modules()}
    twin = copy.deepcopy(module)
    twins = [twin.get_submodule(paths[id(block)]) for block in blocks]
    compute_in([twin], twins if residual else (), dtype)
    return _failure(twin, image_shape, twins)


def _failure(module: nn.Module, image_shape: tuple[int, int, int], blocks: Sequence[nn.Module] = ()) -> str | None:
    """Why a forward pass of *module*, on meta, fails in training or evaluation; its mode changes. Equal *blocks* run once."""
    try:
        with torch.random.fork_rng(devices=[]), OneType():
            for training in (True, False):
                module.train(training)
                with equal_run_once(blocks):
                    module(torch.empty(2, *image_shape, device="meta"))
    except Exception as error:
        return first_line(error)
    return None


def hold_frozen(module: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """Let *module*, on meta, hold its frozen weights in bf16, in place; return a line for the log. See `compute_in`.

    Do it when blocks are found and stages are cut, which run the model as it is. `UserError` where its own code would multiply
    bf16 weights with fp32 inputs, because it does not read them by their names.
    """
    alone = {weight for part in module.modules() if isinstance(part, FP32_ALONE) for weight in part.parameters(recurse=False)}
    frozen = [name for name, p in module.named_parameters() if not (p.requires_grad or p in alone) and p.is_floating_point()]
    if not frozen:
        return "model.frozen_dtype: bf16 changes nothing: no weight is frozen that could be held in it"
    twin, plain = copy.deepcopy(module), copy.deepcopy(module)
    for model in (twin, module):
        weights = dict(model.named_parameters())
        for name in frozen:
            weights[name].data = weights[name].data.to(torch.bfloat16)
    compute_in([twin], (), None)
    if (reason := _failure(twin, image_shape)) and _failure(plain, image_shape) is None:
        raise UserError(
            f"model.frozen_dtype: bf16, but the model's own code does not read its weights by name ({reason}): use fp32"
        )
    count = sum(parameter.numel() for name, parameter in module.named_parameters() if name in set(frozen))
    return f"model.frozen_dtype: bf16: {len(frozen)} frozen tensors of {count:,} parameters are held and saved in bf16"


def autocast_inside(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Let the forward of *module* run under autocast, in place: DeepSpeed switches one off under which it is entered, on CUDA.

    Weights that were cast are forgotten after each forward pass: torch does so only when the outermost autocast ends, and under
    a caller's own the next steps would compute with the weights of this one.
    """
    forward: Callable[..., Any] = module.forward

    @functools.wraps(forward)
    def inside(*args: Any, **kwargs: Any) -> Any:
        torch.clear_autocast_cache()  # of a block that was recomputed
        try:
            with torch.autocast(device.type, dtype=dtype):
                return forward(*args, **kwargs)
        finally:
            torch.clear_autocast_cache()

    module.forward = inside  # type: ignore[method-assign]


def likes_channels_last(module: nn.Module, device: str) -> bool:
    """Whether convolutions are most of *module*, and faster in channels_last on devices of the type *device*, cpu or cuda.

    Measured by timm in training on CUDA: ResNet-50 gains 47 %, ConvNeXt 0 to 4 %, while grouped convolutions (RegNetY) lose
    68 %; depthwise ones are not grouped in this sense. On a CPU depthwise and grouped convolutions gain, by us
    (benchmarks/RESULTS.md): EfficientNet-B0 takes 0.66 of the time, ResNets 0.97 to 1.10.
    """
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]
    # The convolutions of a ConvNeXt are small beside its linear layers, and take their inputs in this layout all the same.
    if sum(conv.kernel_size != (1, 1) for conv in convolutions) < 4:
        return False
    if device == "cpu":
        return any(conv.groups > 1 for conv in convolutions)
    return not any(1 < conv.groups < conv.in_channels for conv in convolutions)
