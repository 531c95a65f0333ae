"""What single operations compute and move: the counting behind every predicted time.

Times are the roofline of Williams et al. (2009), one operation at a time: an operation takes as long as its FLOPs or as its
bytes, whichever is longer. Operations of a kind reach the same share of a device's peaks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PRODUCTS = ("product", "attention", "convolution", "grouped")
"""The kinds that are counted in FLOPs; the others are counted in bytes."""
KINDS = {
    "product": ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul"),
    "convolution": ("convolution", "_convolution", "convolution_backward", "convolution_overrideable"),
    "norm": (
        "native_layer_norm", "native_layer_norm_backward", "native_batch_norm", "native_batch_norm_backward",
        "_native_batch_norm_legit", "_native_batch_norm_legit_functional", "_batch_norm_with_update",
        "batch_norm_backward", "cudnn_batch_norm", "cudnn_batch_norm_backward", "native_group_norm",
        "native_group_norm_backward", "_fused_rms_norm", "_fused_rms_norm_backward", "var_mean", "var",
        "linalg_vector_norm", "norm",
    ),
    "curved": (
        "gelu", "gelu_backward", "silu", "silu_backward", "sigmoid", "sigmoid_backward", "tanh", "tanh_backward", "exp",
        "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data", "softplus", "mish", "elu",
        "elu_backward", "log_sigmoid_forward", "pow", "sqrt", "rsqrt", "sin", "cos", "erf", "hardswish", "hardswish_backward",
    ),
    "pool": (
        "max_pool2d_with_indices", "max_pool2d_with_indices_backward", "avg_pool2d", "avg_pool2d_backward",
        "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "upsample_bilinear2d", "upsample_bilinear2d_backward",
        "upsample_bicubic2d", "upsample_bicubic2d_backward", "upsample_nearest2d", "upsample_nearest2d_backward",
    ),
}  # fmt: skip
"""Operations of torch by kind; the products of grouped convolutions are "grouped", and what is in no row is "add"."""
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
FREE = {
    "detach", "alias", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "lift_fresh", "set_", "resize_", "_local_scalar_dense",
}  # fmt: skip
"""Operations that move nothing, beside views."""


@dataclass(frozen=True)
class Operation:
    """One operation of a recorded pass: its FLOPs, and the bytes that it reads and writes."""

    kind: str
    """Of `KINDS`; or "grouped", "attention", "add"."""
    format: str
    """Number format of what is multiplied: fp32, bf16, fp16."""
    flops: float
    moved: float


FORMATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp32"}


def format_of(tensors: Iterable[Tensor]) -> str:
    return next((FORMATS[name] for one in tensors if (name := str(one.dtype).rpartition(".")[2]) in FORMATS), "fp32")


def operation(func: Any, args: Any, kwargs: Any, result: Any) -> Operation | None:
    """What the call of an aten operator has computed and moved; None where that is nothing."""
    packet = func._overloadpacket
    name = packet.__name__
    if func.is_view or name in FREE:
        return None
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    # Of an expanded tensor there is one copy.
    moved = float(sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in (*inputs, *outputs)))
    if not moved:
        return None
    kind, flops = KIND_OF.get(name.removesuffix("_"), "add"), 0.0
    if (formula := flop_registry.get(packet)) is not None:
        flops = float(formula(*args, **(kwargs or {}), out_val=result))
        if kind == "convolution":
            groups = args[8] if name != "convolution_backward" else args[9]
            kind = "grouped" if groups > 1 else kind
        elif kind not in PRODUCTS:
            kind = "attention"
    return Operation(kind, format_of(inputs or outputs), flops, moved)


def attention(query: Tensor, key: Tensor, value: Tensor, backward: bool) -> Operation:
    """Fused attention, which never writes its scores. The backward pass has five products where the forward pass has two."""
    *batch, length, width = query.shape
    flops = 2.0 * length * key.shape[-2] * (width + value.shape[-1])
    for size in batch:
        flops *= size
    tensors = float(query.nbytes + key.nbytes + value.nbytes + query.nbytes)
    return Operation("attention", format_of((query,)), flops * (2.5 if backward else 1.0), tensors * (2.0 if backward else 1.0))


@dataclass(frozen=True)
class Work:
    """*count* equal operations, as a function of the number of images."""

    kind: str
    format: str
    flops: float
    """For one image."""
    moved: float
    """Bytes for one image."""
    fixed: float = 0.0
    """Bytes that do not depend on the images, such as weights."""
    count: int = 1


def per_image(few: Sequence[Operation], many: Sequence[Operation], sizes: tuple[int, int]) -> tuple[Work, ...]:
    """The work of a pass that was recorded with two numbers of images, equal operations counted together."""
    counts: dict[tuple[str, str, float, float, float], int] = {}
    pairs = zip(few, many) if len(few) == len(many) else ((one, one) for one in many)
    for one, other in pairs:
        moved, flops, fixed = other.moved / sizes[1], other.flops / sizes[1], 0.0
        if one is not other:
            moved = max(0.0, (other.moved - one.moved) / (sizes[1] - sizes[0]))
            fixed = max(0.0, one.moved - moved * sizes[0])
        key = other.kind, other.format, flops, moved, fixed
        counts[key] = counts.get(key, 0) + 1
    return tuple(Work(*key, count) for key, count in counts.items())
