"""fp8: linear layers that multiply 8-bit floats, with a scale for each row (rowwise scaling, Micikevicius et al. 2022).

Of the three products of a layer the output and the gradient of the input are computed in fp8 (e4m3), the gradient of the weight
in bf16. Scales are found anew in each pass, so there is no state: parameters, checkpoints and exports are those of bf16.

The layers stay torch's own modules and change their class, as those with adapters do (`lora.py`); torchao's ``Float8Linear``
would be another module than the one that blocks, stages and adapters hold. What is multiplied is one operation of torch,
``_scaled_mm``, on CUDA and on the CPU, where it gives the same numbers slowly.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bigvision.errors import UserError, nearest_paths
from bigvision.models.blocks import Block
from bigvision.models.lora import LoraLinear
from bigvision.models.tracing import first_line

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of `FP8`."""
EXPONENT = 0x7F800000
"""The bits of a number in fp32 that are its exponent."""
MULTIPLE = 16
"""What both sides of a weight must be a multiple of, for the kernels of CUDA."""
CAPABILITY = (8, 9)
"""The first GPUs that multiply fp8."""


# What runs.


def quantized(values: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix *values* in fp8, row-major, and what each row is to be multiplied with, fp32 (rows, 1).

    Scales are powers of two, so that values are rounded once; and gradients of a loss that is twice as large, as with twice
    the ranks, are twice as large. A row with a value that is not finite comes out with NaN.
    """
    largest = values.abs().amax(-1, keepdim=True).float()
    # Without the mantissa it is the power of two below. Where all is zero, or almost, any scale will do.
    scale = (LARGEST / largest.clamp(min=1e-12)).view(torch.int32).bitwise_and(EXPONENT).view(torch.float32)
    # Compiled code may take the largest of values that it has not rounded yet: what is rounded up must not become NaN.
    scaled = (values.float() * scale).clamp(-LARGEST, LARGEST)
    return scaled.to(FP8, memory_format=torch.contiguous_format), scale.reciprocal()


def product(left: Tensor, right: Tensor) -> Tensor:
    """*left* (M, K) times *right* (N, K) transposed, both rounded to fp8 row by row, in bf16 (M, N)."""
    (first, rows), (second, columns) = quantized(left), quantized(right)
    # With slow accumulation the rowwise kernels lose what fp8 gains (pytorch #147971).
    return torch._scaled_mm(first, second.t(), rows, columns.view(1, -1), out_dtype=torch.bfloat16, use_fast_accum=True)


class _Linear(torch.autograd.Function):
    """``x @ weight.t()`` of matrices in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        of_x = product(gradient, weight.t()) if weight is not None else None
        # In bf16: it is added up over all rows, in which errors of single ones would stay.
        return of_x, gradient.t() @ x if x is not None else None


class Float8Linear(nn.Linear):
    """A linear layer in fp8: one of torch's that has changed its class. It is given, and reads its weight as, bf16."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight.to(torch.bfloat16)
        rows = input.to(torch.bfloat16).reshape(-1, self.in_features)
        output = _Linear.apply(rows, weight).view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output + self.bias.to(torch.bfloat16)


class Float8LoraLinear(LoraLinear, Float8Linear):
    """One with an adapter, whose products stay in bf16."""


IN_FLOAT8: dict[type[nn.Linear], type[nn.Linear]] = {nn.Linear: Float8Linear, LoraLinear: Float8LoraLinear}


def use_float8(part: nn.Module, names: frozenset[str]) -> None:
    """Let the layers at the paths *names* in *part* compute in fp8, in place. Do it before `formats.compute_in`."""
    for path, module in part.named_modules():
        if path in names and type(module) in IN_FLOAT8:
            module.__class__ = IN_FLOAT8[type(module)]  # type: ignore[assignment]


def check_float8(device: torch.device) -> None:
    """Raise `UserError` where *device* does not multiply fp8 with a scale for each row. A CPU always does, slowly."""
    if device.type != "cuda":
        return
    name, found = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        needs = f"needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer (H100, L40S, RTX 4090)"
        raise UserError(f"parallel.precision: fp8 {needs}, and {name} has {found[0]}.{found[1]}: use bf16")
    try:
        one = torch.ones(MULTIPLE, MULTIPLE, dtype=torch.bfloat16, device=device)
        fine = bool((product(one, one) == MULTIPLE).all())
    except RuntimeError as error:  # a library that lacks the kernel for this GPU
        raise UserError(f"parallel.precision: fp8 cannot be computed on {name} ({first_line(error)}): use bf16") from None
    if not fine:
        raise UserError(f"parallel.precision: fp8 computes wrong products on {name}: use bf16")


# Which layers.


BF16_FLOPS = 0.73 * 989.4e12
"""FLOP/s of products in bf16 on an H100: the share of the peak that those of a compiled ViT-H reached."""
SHARE = 0.62
"""Of the peak of fp8, what products with a scale for each row reach: four of FBGEMM's times on an H100 (its pull request 2764;
3456 to 4176 rows, weights of 4096 x 4096 to 12288) are 0.54 to 0.68 of it. On ViTs' shapes it has not been measured."""
FP8_FLOPS = SHARE * 1978.9e12
BANDWIDTH = 0.73 * 3350e9
"""Bytes/s of what is between products."""
CAST = 3
"""Bytes that a value costs which becomes fp8: 2 are read and 1 is written, if a row's largest value is found and used by one
kernel. Where that is the kernel which makes the value it is less, in eager code more."""
PAYS = 1.05
"""How much faster a layer must be in fp8 than in bf16 to be chosen: the model leaves out all that kernels do beside."""


def speedup(rows: float, wide: int, out: int, trained: bool = True) -> float:
    """How much faster a layer of (*out*, *wide*) is in fp8 than in bf16, forward and backward with so many *rows* (images times
    tokens), by the roofline (Williams et al. 2009) of an H100.

    The same on every device, so that a run computes the same numbers on each. *trained*: the weight has a gradient.
    """
    flops, large, small = 2.0 * rows * wide * out, rows * wide, rows * out
    weight = wide * out

    def bf16() -> float:
        return max(flops / BF16_FLOPS, 2 * (large + small + weight) / BANDWIDTH)

    def fp8(entering: float, leaving: float) -> float:
        return max(flops / FP8_FLOPS, (entering + weight + 2 * leaving) / BANDWIDTH)

    # The weight is cast for both passes; along its columns it is read once more.
    casts = CAST * (large + small) + (2 * CAST + 2) * weight
    products = fp8(large, small) + fp8(small, large)
    return (2 + trained) * bf16() / (products + trained * bf16() + casts / BANDWIDTH)


@dataclass(frozen=True)
class Float8:
    """The layers of a model that compute in fp8."""

    names: frozenset[str]
    """Their paths."""
    note: str
    """A line for the log: how many, and what becomes of the others."""


def choose_float8(
    module: nn.Module, blocks: Sequence[Block], image_shape: tuple[int, int, int], images: int, asked: str | tuple[str, ...]
) -> Float8:  # fmt: skip
    """Choose the layers of *module*, on meta, that compute in fp8; *images* are those of a micro-batch.

    *asked* is ``parallel.fp8_layers``: auto takes those of the blocks, without the first and the last one, that `speedup` says
    it pays for. Raises `UserError` for names that match nothing, or a layer that cannot be in fp8.
    """
    rows = rows_of(module, image_shape)
    linear = {path: part for path, part in module.named_modules() if isinstance(part, nn.Linear)}
    low_rank = {id(part) for layer in linear.values() if isinstance(layer, LoraLinear) for part in (layer.lora_A, layer.lora_B)}
    linear = {path: part for path, part in linear.items() if id(part) not in low_rank}
    if asked != "auto":
        names = _named(module, linear, rows, (asked,) if isinstance(asked, str) else asked)
        return Float8(names, f"parallel.precision: fp8: {len(names)} of {len(linear)} linear layers, which fp8_layers names")
    blocked = [block for block in blocks if any(path.startswith(f"{block.path}.") for path in linear)]
    ends = tuple(f"{block.path}." for block in (blocked[:1] + blocked[-1:]))
    within = tuple(f"{block.path}." for block in blocked)
    reasons: dict[str, str] = {}
    for path, layer in linear.items():
        if not path.startswith(within):
            reasons[path] = "outside of the blocks"
        elif path.startswith(ends):
            reasons[path] = "in the first or last block"
        elif _unfit(layer, rows.get(path)) is not None:
            reasons[path] = "not possible"
        elif speedup(images * rows[path], layer.in_features, layer.out_features, layer.weight.requires_grad) < PAYS:
            reasons[path] = "too narrow to gain"
    names = frozenset(linear.keys() - reasons.keys())
    parts = [f"{len(names)} of {len(linear)} linear layers{_kinds(names)}"]
    others = [
        f"{len(paths)} {reason}{_kinds(paths)}"
        for reason in dict.fromkeys(reasons.values())
        if (paths := [path for path, why in reasons.items() if why == reason])
    ]
    parts += [f"the others in bf16: {', '.join(others)}"] if others else []
    return Float8(names, f"parallel.precision: fp8: {'; '.join(parts)}")


_rows: WeakKeyDictionary[nn.Module, dict[tuple[int, int, int], Mapping[str, float]]] = WeakKeyDictionary()
"""What `rows_of` has found: the planner asks once for each micro-batch."""


def rows_of(module: nn.Module, image_shape: tuple[int, int, int]) -> Mapping[str, float]:
    """For each linear layer that a forward pass of *module*, on meta, calls: rows of what it is given, for an image.

    Of several calls the fewest. Empty where meta cannot run the model.
    """
    known = _rows.setdefault(module, {})
    if image_shape not in known:
        known[image_shape] = _watched(module, image_shape)
    return known[image_shape]


def _watched(module: nn.Module, image_shape: tuple[int, int, int]) -> Mapping[str, float]:
    found: dict[str, float] = {}
    samples = 2

    def called(path: str, layer: Any, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor):
            count = inputs[0].numel() / layer.in_features / samples
            found[path] = min(count, found.get(path, count))

    hooks = [
        part.register_forward_pre_hook(functools.partial(called, path))
        for path, part in module.named_modules() if isinstance(part, nn.Linear)
    ]  # fmt: skip
    modes = {part: part.training for part in module.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module.train()(torch.empty(samples, *image_shape, device="meta"))
    except Exception:  # a model of the user's may not run on meta
        return {}
    finally:
        for hook in hooks:
            hook.remove()
        for part, mode in modes.items():
            part.training = mode
    return found


def _unfit(layer: nn.Linear, rows: float | None) -> str | None:
    """Why *layer* cannot compute in fp8; None where it can."""
    if type(layer) not in IN_FLOAT8:
        return f"is a {type(layer).__name__}, which has a forward of its own"
    if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
        return f"is {layer.in_features} to {layer.out_features} wide, which are not both multiples of {MULTIPLE}"
    return "is not called by the model, which reads its weight in another way" if rows is None else None


def _named(
    module: nn.Module, linear: Mapping[str, nn.Linear], rows: Mapping[str, float], patterns: Sequence[str]
) -> frozenset[str]:  # fmt: skip
    """The layers that *patterns* name, or that lie in a module which they name."""
    found: set[str] = set()
    for pattern in patterns:
        paths = [path for path, _ in module.named_modules() if path and fnmatchcase(path, pattern)]
        inside = {path for path in linear if any(path == one or path.startswith(f"{one}.") for one in paths)}
        if not inside:
            near = nearest_paths(pattern, list(linear))
            raise UserError(f"parallel.fp8_layers: {pattern!r} matches no linear layer; the nearest names are {near}")
        found |= inside
    for path in sorted(found):
        if (why := _unfit(linear[path], rows.get(path))) is not None:
            raise UserError(f"parallel.fp8_layers: {path} {why}: leave it out, or use auto")
    return frozenset(found)


def _kinds(paths: Sequence[str] | frozenset[str]) -> str:
    """What layers at *paths* are called, without the numbers of their blocks."""
    names = list(dict.fromkeys(re.sub(r"^.*\.\d+\.", "", path) for path in sorted(paths)))
    return f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else ""
