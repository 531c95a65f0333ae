"""Muon (Jordan et al. 2024) over whole tensors and over shards of rows, as FSDP2 makes them.

A matrix is stepped along the nearest orthogonal one to its momentum, which takes all of its rows. Of sharded matrices each rank
orthogonalises a share: it receives the rows of its matrices from all ranks and sends back to each the rows of the results.
Momentum stays sharded, so checkpoints have the same bytes as those of whole tensors. The iteration and the choice of what is a
matrix are timm's; a convolution's kernels are one matrix, with a row for each output channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import muon as timm_muon
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

DTYPE = torch.bfloat16
"""Of the iteration, which rounds the update first of all: ranks exchange the rounded one, and no digit is lost by that."""
BUCKET = 16 * 2**20
"""Numbers that a rank receives in one exchange; smaller matrices share it."""
COEFFICIENTS = timm_muon.resolve_ns_coefficients("quintic", timm_muon._COEFFICIENTS)
EPS = timm_muon.MUON_EPS

Matrix = tuple[Tensor, dict[str, Any]]  # a parameter and its group


class Muon(Optimizer):
    """timm's Muon with Nesterov's momentum, steps as large as AdamW's (Liu et al. 2025), and NAdamW for what is no matrix.

    Parameters are plain tensors, or DTensors of which each rank has some rows; the state is of this rank's rows. All ranks
    step together. Whether to step is decided on the device: where `skipped` is true, nothing changes.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": 0.0})
        parameters: list[Tensor] = [parameter for group in self.param_groups for parameter in group["params"]]
        device = parameters[0].device if parameters else torch.device("cpu")
        self.skipped = torch.zeros((), dtype=torch.bool, device=device)
        for group in self.param_groups:
            group["step"] = torch.zeros((), device=device)
        for parameter in parameters:
            keys = ("momentum_buffer",) if is_matrix(parameter) else ("exp_avg", "exp_avg_sq")
            self.state[parameter] = {key: torch.zeros_like(_local(parameter.detach())) for key in keys}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Step all parameters that have a gradient."""
        matrices: list[Matrix] = []
        for group in self.param_groups:
            group["step"] += ~self.skipped
            others: list[Tensor] = []
            for parameter in group["params"]:
                if parameter.grad is not None and is_matrix(parameter):
                    matrices.append((parameter, group))
                elif parameter.grad is not None:
                    others.append(parameter)
            if others:
                self._step_others(others, group)
        for ranks, bucket in _buckets(matrices):
            rows = [self._update(parameter, group["momentum"]).to(DTYPE) for parameter, group in bucket]
            if ranks is None:
                directions = [orthogonal(matrix) for matrix in rows]
            else:
                directions = orthogonal_rows(rows, [parameter.shape for parameter, _ in bucket], ranks)
            for (parameter, group), direction in zip(bucket, directions):
                self._apply(parameter, direction, group)

    def _update(self, parameter: Tensor, momentum: float) -> Tensor:
        """Move this rank's rows of the momentum; return these rows of Nesterov's update."""
        assert parameter.grad is not None
        grad, buffer = _local(parameter.grad), self.state[parameter]["momentum_buffer"]
        torch.where(self.skipped, buffer, buffer.lerp(grad, 1.0 - momentum), out=buffer)
        return grad.lerp(buffer, momentum)

    def _apply(self, parameter: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        local, shape = _local(parameter), parameter.shape
        scale = timm_muon.get_lr_scale(torch.Size((shape[0], shape[1:].numel())), "match_rms_adamw")
        stepped = local * (1 - group["lr"] * group["weight_decay"])
        stepped.add_(direction.reshape(local.shape), alpha=-group["lr"] * scale)
        torch.where(self.skipped, local, stepped, out=local)

    def _step_others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Take a step of NAdamW, as timm's, with all *parameters* as one tensor: they are many and small."""
        (beta1, beta2), lr = group["betas"], group["lr"]
        lists = [[_local(parameter) for parameter in parameters]]
        lists += [[self.state[parameter][key] for parameter in parameters] for key in ("exp_avg", "exp_avg_sq")]
        value, average, square = before = [torch.cat([tensor.reshape(-1) for tensor in tensors]) for tensors in lists]
        grad = torch.cat([_local(parameter.grad).reshape(-1) for parameter in parameters if parameter.grad is not None])
        steps = group["step"].double()
        step_size, correction = lr / (1 - beta1**steps), (1 - beta2**steps).sqrt()
        average, square = average.lerp(grad, 1 - beta1), (square * beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (square.sqrt() / correction.float()).add_(EPS)
        step = average.lerp(grad, 1 - beta1) * step_size.float() / denominator
        value = value * (1 - lr * group["weight_decay"]) - step
        sizes = [tensor.numel() for tensor in lists[0]]
        for tensors, old, new in zip(lists, before, (value, average, square)):
            parts = torch.where(self.skipped, old, new).split(sizes)
            torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors)])


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter is orthogonalised, by its whole shape."""
    return bool(timm_muon._is_suitable_for_muon(parameter))


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, by Newton and Schulz's iteration."""
    return timm_muon.zeropower_via_newtonschulz(matrix.flatten(1), len(COEFFICIENTS), COEFFICIENTS, dtype=DTYPE)


def orthogonal_rows(rows: Sequence[Tensor], shapes: Sequence[torch.Size], group: dist.ProcessGroup) -> list[Tensor]:
    """This rank's *rows* of matrices of whole *shapes* in, the same rows of the orthogonal matrices out.

    Every rank of *group* calls it with its rows of the same matrices. Matrix k is orthogonalised on rank k % ranks.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    order = [place for owner in range(ranks) for place in range(owner, len(rows), ranks)]
    sent = torch.cat([rows[place].reshape(-1) for place in order])
    sent_to = [sum(part.numel() for part in rows[owner::ranks]) for owner in range(ranks)]
    mine = shapes[rank::ranks]
    heights = [rows_of_ranks(shape, ranks) for shape in mine]
    sizes = [[height[other] * shape[1:].numel() for shape, height in zip(mine, heights)] for other in range(ranks)]
    received_from = [sum(some) for some in sizes]
    received = sent.new_empty(sum(received_from))
    dist.all_to_all_single(received, sent, received_from, sent_to, group=group)
    pieces = [part.split(some) for part, some in zip(received.split(received_from), sizes)]
    done = [orthogonal(torch.cat(parts).view(shape)).split(height) for shape, height, parts in zip(mine, heights, zip(*pieces))]
    # A rank without a matrix of its own sends nothing, which torch.cat cannot make.
    received = torch.cat([received[:0], *(parts[other].reshape(-1) for other in range(ranks) for parts in done)])
    dist.all_to_all_single(sent, received, sent_to, received_from, group=group)
    back = dict(zip(order, sent.split([rows[place].numel() for place in order])))
    return [back[place] for place in range(len(rows))]


def rows_of_ranks(shape: torch.Size, ranks: int) -> list[int]:
    """How many rows of a tensor of *shape* each rank has: FSDP2 cuts dimension 0 as torch.chunk does."""
    chunk = -(-shape[0] // ranks)
    return [max(0, min(shape[0] - chunk * rank, chunk)) for rank in range(ranks)]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _ranks(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks among which the rows of *parameter* are spread; None where this one has them all."""
    if not isinstance(parameter, DTensor):
        return None
    (dimension,) = (place for place, placement in enumerate(parameter.placements) if placement.is_shard(0))
    return parameter.device_mesh.get_group(dimension) if parameter.device_mesh.size(dimension) > 1 else None


def _buckets(matrices: list[Matrix]) -> Iterator[tuple[dist.ProcessGroup | None, list[Matrix]]]:
    """*matrices* that are exchanged together, with the ranks that have rows of them; the same on every rank.

    Those with the most work come first, so that neighbours, which different ranks orthogonalise, take about as long.
    """

    def work(matrix: Matrix) -> int:
        rows, columns = matrix[0].shape[0], matrix[0].shape[1:].numel()
        return min(rows, columns) * rows * columns

    bucket: list[Matrix] = []
    ranks = None
    for matrix in sorted(matrices, key=work, reverse=True):
        bucket.append(matrix)
        ranks = _ranks(matrix[0])
        count = 1 if ranks is None else ranks.size()
        full = sum(parameter.numel() for parameter, _ in bucket) >= BUCKET * count
        if ranks is None or (full and len(bucket) % count == 0):
            yield ranks, bucket
            bucket = []
    if bucket:
        yield ranks, bucket
