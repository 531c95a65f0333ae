"""Which kernels are worth more than what torch picks: attention by head size, residual and norm, the loss of a large head, QKV.

Each probe is a forward and a backward pass of one piece of a ViT, with torch's own choice as the baseline. Before anything is
timed, the sides have to agree. What gains less than `WORTH` stays as it is, and is written down in RESULTS.md:

    attention: ``scaled_dot_product_attention`` by head size; each backend alone, and heads padded with zeros to one of `SIZES`
    residual: ``x + branch`` and the LayerNorm behind it, and compiled
    loss: a linear head of 21,841 classes and cross-entropy; compiled, and torch's ``linear_cross_entropy`` where it has it
    qkv: one projection taken apart as timm does it, and in three parts

Run it with ``make gpu``; it writes ``benchmarks/results/kernel_time_DEVICE_PROBE.{json,md}``.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Side, compare

RESULTS = Path(__file__).parent / "results"
WORTH = 0.9
"""Of the baseline's time: above it, a kernel of one's own is not worth its code."""
HEADS = (64, 72, 80, 88, 96, 104, 112, 128)
SIZES = (64, 96, 128, 256)
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
}  # fmt: skip
Piece = Callable[..., Tensor]
"""Computes an output from tensors, of which gradients are taken."""


def attention(size: int, small: bool, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Piece]]:
    """Of queries, keys and values with heads of *size*."""
    shape = (2, 2, 10, size) if small else (32, 16, 257, size)
    inputs = [_random(shape, dtype, device) for _ in range(3)]
    sides: dict[str, Piece] = {"torch's choice": F.scaled_dot_product_attention}
    for name, backend in BACKENDS.items() if device == "cuda" else ():
        sides[name] = functools.partial(_by, backend)
    wider = next((wide for wide in SIZES if wide > size), None)
    if wider is not None and size not in SIZES:
        sides[f"padded to {wider}"] = functools.partial(_padded, wider)
    return inputs, sides


def _by(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value)


def _padded(wide: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Zeros change no product of a query with a key, and give zeros in the output, which are cut off."""
    size = query.shape[-1]
    query, key, value = (F.pad(one, (0, wide - size)) for one in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=size**-0.5)[..., :size]


def residual(small: bool, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Piece]]:
    """Of the residual stream in fp32 and a branch's output in *dtype*."""
    shape, width = ((2, 10, 64), 64) if small else ((96, 257, 1280), 1280)
    inputs = [_random(shape, torch.float32, device), _random(shape, dtype, device)]
    weights = [_random((width,), torch.float32, device) for _ in range(2)]

    def plain(stream: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(stream + branch, (width,), weight, bias).to(dtype)

    return [*inputs, *weights], {"torch's choice": plain, "compiled": torch.compile(plain)}


def loss(small: bool, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Piece]]:
    """Of features and a head's weight; the targets are no input."""
    samples, width, classes = (4, 64, 50) if small else (1024, 1280, 21841)
    inputs = [_random((samples, width), dtype, device), _random((classes, width), dtype, device)]
    targets = torch.arange(samples, device=device) % classes

    def plain(features: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(features, weight).float(), targets)

    sides: dict[str, Piece] = {"torch's choice": plain, "compiled": torch.compile(plain)}
    if (fused := getattr(F, "linear_cross_entropy", None)) is not None:
        sides["linear_cross_entropy"] = lambda features, weight: fused(features, weight, targets).float()
    return inputs, sides


def qkv(small: bool, dtype: torch.dtype, device: str) -> tuple[list[Tensor], dict[str, Piece]]:
    """Of an attention's input and the weight of its one projection."""
    samples, tokens, heads, size = (2, 10, 2, 64) if small else (96, 257, 16, 80)
    width = heads * size
    inputs = [_random((samples, tokens, width), dtype, device), _random((3 * width, width), dtype, device)]

    def as_timm(x: Tensor, weight: Tensor) -> Tensor:
        packed = F.linear(x, weight).reshape(samples, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
        query, key, value = packed.unbind(0)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)

    def apart(x: Tensor, weight: Tensor) -> Tensor:
        parts = F.linear(x, weight).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (heads, size)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)

    return inputs, {"as timm does it": as_timm, "in three parts": apart, "compiled": torch.compile(as_timm)}


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return (torch.randn(shape, device=device) * 0.1).to(dtype).requires_grad_()


PROBES: dict[str, Callable[[bool, torch.dtype, str], tuple[list[Tensor], dict[str, Piece]]]] = {
    **{f"attention_{size}": functools.partial(attention, size) for size in HEADS},
    "residual": residual, "loss": loss, "qkv": qkv,
}  # fmt: skip


def both_passes(piece: Piece, inputs: list[Tensor]) -> list[Tensor]:
    """The output of *piece*, and the gradients of its sum."""
    output = piece(*inputs)
    return [output.detach(), *torch.autograd.grad(output.sum(), inputs)]


def agreeing(inputs: list[Tensor], sides: dict[str, Piece], tolerance: float) -> Iterator[tuple[str, Piece]]:
    """The sides that this device has. `RuntimeError` where one computes something else than the first."""
    expected = None
    for name, piece in sides.items():
        try:
            found = both_passes(piece, inputs)
        except RuntimeError as error:
            if expected is None:
                raise
            print(f"{name}: not here: {str(error).splitlines()[0]}", flush=True)
            continue
        expected = expected or found
        for one, other in zip(found, expected):
            scale = other.float().abs().max().item() or 1.0
            if (one.float() - other.float()).abs().max().item() > tolerance * scale:
                raise RuntimeError(f"{name} computes something else")
        yield name, piece


def measure(probe: str, device: str, small: bool, rounds: int, results: Path) -> str:
    """Time one probe; returns its table as Markdown, with what is worth it."""
    torch.manual_seed(0)
    dtype = torch.float32 if small else torch.bfloat16
    inputs, sides = PROBES[probe](small, dtype, device)
    found = dict(agreeing(inputs, sides, 1e-4 if small else 0.05))
    timed: dict[str, Side] = {name: functools.partial(both_passes, piece, inputs) for name, piece in found.items()}
    baseline = next(iter(timed))
    report = compare(f"Kernels: {probe}", timed, baseline, rounds=rounds, calls=3, warmup=2, device=device)
    report.write(results / f"kernel_time_{device}_{probe}")
    gains = [line.name for line in report.lines if line.interval[1] < WORTH and not line.name.startswith(baseline)]
    return f"{report.table()}\nWorth it (less than {WORTH} of the time): {', '.join(gains) or 'nothing'}.\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--probe", choices=tuple(PROBES), action="append", help="by default all")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--small", action="store_true", help="shapes and fp32 for a dry run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    for probe in asked.probe or PROBES:
        print(measure(probe, asked.device, asked.small, asked.rounds, asked.results), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
