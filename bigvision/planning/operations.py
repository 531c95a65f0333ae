"""What single operations compute and move: the counting behind every predicted time.

Times are the roofline of Williams et al. (2009), one operation at a time: an operation takes as long as its FLOPs or as its
bytes, whichever is longer. On a datasheet operations of a kind reach the same share of the peaks. Where a machine was measured,
kinds are divided into variants, whose rates differ by an order of magnitude on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from bigvision.models.alike import tensors_in

PRODUCTS = ("product", "attention", "convolution", "grouped")
"""The kinds that are counted in FLOPs; the others are counted in bytes."""
KINDS = {
    "product": ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "matmul", "_scaled_mm"),
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
IMAGE_CHANNELS = 4
"""A convolution of at most as many channels reads images."""
FREE = {
    "detach", "alias", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "lift_fresh", "set_", "resize_",
}  # fmt: skip
"""Operations that move nothing, beside views."""


FILLING = {"zero", "fill", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like"}
"""Operations that write without reading."""
FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}


PRIME = 1009
IMAGES = 2 * PRIME
"""How many images are recorded. No other dimension of a model is a multiple of so large a prime number: what can be divided by
it grows with the images, and the rest is fixed. So one recording gives the numbers of every micro-batch."""


@dataclass(frozen=True)
class Amount:
    """A number of bytes or operations that grows with the images."""

    fixed: float = 0.0
    per_image: float = 0.0

    @classmethod
    def of(cls, recorded: float) -> Amount:
        """What *recorded*, of `IMAGES` images, is for any number of them."""
        return cls(0.0, recorded / IMAGES) if recorded % PRIME == 0 else cls(recorded)

    def at(self, images: float) -> float:
        return self.fixed + self.per_image * images

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.fixed + other.fixed, self.per_image + other.per_image)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.fixed - other.fixed, self.per_image - other.per_image)


NOTHING = Amount()


@dataclass(frozen=True)
class Operation:
    """One operation of a recorded pass."""

    kind: str
    """Of `KINDS`; or "grouped", "attention", "add"."""
    format: str
    """Number format of what is multiplied: fp32, bf16, fp16, fp8."""
    flops: float
    reads: Mapping[int, float]
    """Bytes, by the tensor's number."""
    writes: Mapping[int, float]
    variant: str = ""
    """Words of which the first matters most: back, pointwise, depthwise, image, batch, last (laid out as channels_last)."""
    others: Sequence[float] = ()
    """Further bytes that are moved."""

    @property
    def sizes(self) -> list[float]:
        """All bytes that are moved, tensor by tensor."""
        return [*self.reads.values(), *self.writes.values(), *self.others]

    @property
    def moved(self) -> float:
        return sum(self.sizes)


@dataclass(frozen=True)
class Work:
    """*count* equal operations, as a function of the number of images."""

    kind: str
    """As of `Operation`, or "fused": what compiled code computes between two products."""
    format: str
    flops: float
    """For one image."""
    moved: float
    """Bytes for one image."""
    fixed: float = 0.0
    """Bytes that do not depend on the images, such as weights."""
    count: float = 1
    variant: str = ""
    """As of `Operation`."""


class Log:
    """The operations of a pass, in their order."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []
        self._numbers: dict[int, int] = {}  # of tensors, by their storage; a storage's key is used again after its end
        self._count = 0

    def add(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Take the call of an aten operator, unless it moves nothing."""
        name = func._overloadpacket.__name__
        plain = name.removesuffix("_")
        inputs = tensors_in((args, kwargs))
        outputs = tensors_in(result)
        reads = {self._number(tensor): _bytes(tensor) for tensor in inputs}
        old = {tensor.untyped_storage()._cdata for tensor in inputs}
        writes = {self._number(tensor, tensor.untyped_storage()._cdata not in old): _bytes(tensor) for tensor in outputs}
        if func.is_view or name in FREE or not writes:
            return
        kind, flops = KIND_OF.get(plain, "add"), 0.0
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            flops = float(formula(*args, **(kwargs or {}), out_val=result))
            if kind == "convolution":
                backward = name == "convolution_backward"
                if args[9 if backward else 8] > 1:
                    kind = "grouped"
                    if backward:  # torch counts a weight's gradient as if each group had the channels of all
                        flops = 4.0 * args[0].numel() * args[2][0].numel()
            elif kind not in PRODUCTS:
                kind = "attention"
        if plain in FILLING:
            reads = {}
        self.operations.append(Operation(kind, _format(inputs or outputs), flops, reads, writes, _variant(kind, plain, inputs)))

    def attention(self, flops: float, moved: Sequence[float], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Take a pass of fused attention, which never writes its scores; a backward pass reads gradients too."""
        reads = {self._number(tensor): 0.0 for tensor in inputs}
        writes = {self._number(tensor, True): 0.0 for tensor in outputs}
        variant = "back" if len(inputs) > 3 else ""
        self.operations.append(Operation("attention", _format(inputs), flops, reads, writes, variant, moved))

    def _number(self, tensor: Tensor, new: bool = False) -> int:
        key = tensor.untyped_storage()._cdata
        if new or key not in self._numbers:
            self._count += 1
            self._numbers[key] = self._count
        return self._numbers[key]


def _variant(kind: str, name: str, inputs: Sequence[Tensor]) -> str:
    """What, beside their size, decides how fast operations of *kind* are."""
    back = "backward" in name
    words = ["back"] * back
    if kind in ("convolution", "grouped"):
        value, weight = inputs[1:3] if back else inputs[:2]
        if kind == "grouped":
            words += ["depthwise"] * (weight.shape[1] == 1)
        elif value.shape[1] <= IMAGE_CHANNELS:
            words.append("image")
        elif weight[0, 0].numel() == 1:
            words.append("pointwise")
    elif kind == "norm":
        words += ["batch"] * ("batch_norm" in name)
    if kind in ("convolution", "grouped", "norm", "pool") and any(map(_last, inputs)):
        words.append("last")
    return " ".join(words)


def _last(tensor: Tensor) -> bool:
    """Whether an image's channels lie together."""
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def rate_name(kind: str, format: str, variant: str) -> str:
    """The name of a rate: of products by number format."""
    return " ".join(filter(None, (kind, format if kind in PRODUCTS else "", variant)))


def _bytes(tensor: Tensor) -> float:
    """Of an expanded tensor there is one copy."""
    return float(min(tensor.nbytes, tensor.untyped_storage().nbytes()))


def _format(tensors: Iterable[Tensor]) -> str:
    return next((FORMATS[tensor.dtype] for tensor in tensors if tensor.dtype in FORMATS), "fp32")


def fused(operations: Sequence[Operation]) -> list[Operation]:
    """*operations* as compiled code does them: between two products each tensor is read once, and written if it is used later.

    What nobody uses among them is the pass's result, or kept for the backward pass.
    """
    uses: dict[int, int] = {}
    stretches: list[list[Operation]] = [[]]
    for one in operations:
        if one.kind in PRODUCTS or one.kind == "pool":
            stretches += [[one], []]
        else:
            stretches[-1].append(one)
    for at, stretch in enumerate(stretches):
        for one in stretch:
            uses.update(dict.fromkeys(one.reads, at))
    found: list[Operation] = []
    for at, stretch in enumerate(stretches):
        if not stretch or stretch[0].kind in PRODUCTS or stretch[0].kind == "pool":
            found += stretch
            continue
        reads: dict[int, float] = {}
        writes: dict[int, float] = {}
        for one in stretch:
            reads.update({number: size for number, size in one.reads.items() if number not in writes})
            writes.update(one.writes)
        used = {number for one in stretch for number in one.reads}
        writes = {number: size for number, size in writes.items() if uses.get(number, -1) > at or number not in used}
        found.append(Operation("fused", stretch[0].format, 0.0, reads, writes))
    return found


def per_image(operations: Sequence[Operation]) -> tuple[Work, ...]:
    """The work of a pass that was recorded with `IMAGES` images, equal operations counted together."""
    counts: dict[tuple[str, str, float, float, float, str], int] = {}
    for one in operations:
        moved = sum(map(Amount.of, one.sizes), NOTHING)
        key = one.kind, one.format, Amount.of(one.flops).per_image, moved.per_image, moved.fixed, one.variant
        counts[key] = counts.get(key, 0) + 1
    return tuple(Work(*key[:-1], count, key[-1]) for key, count in counts.items())
