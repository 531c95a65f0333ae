"""Consecutive blocks of the model on each rank; micro-batches flow through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigvision.config import SPLIT_BACKWARD, Config, Size, micro_batch, other_sizes
from bigvision.data.batch import Batch, StepBatch
from bigvision.engine.engine import Engine, finite_samples
from bigvision.engine.parallelize import make_offload, replicate, shard, wrap_blocks
from bigvision.engine.step import NativeStep, seed_dropout
from bigvision.errors import UserError, either
from bigvision.models import Blocks, Blueprint
from bigvision.pipeline import Placement, StageMemory, make_schedule, plan_stages
from bigvision.pipeline.schedules import USABLE
from bigvision.ranges import FORWARD, mark
from bigvision.runtime import Runtime
from bigvision.samples import each_tensor
from bigvision.tasks import Task


class PipelineEngine(Engine):
    """Stages of a traced model under the schedules of ``torch.distributed.pipelining``.

    With more ranks than stages each stage is sharded (FSDP2) or copied over the ranks that share it. What crosses a cut
    travels in the compute precision. Running statistics follow the micro-batches in their order. Random numbers of a
    forward pass are a function of (seed, step, data-parallel rank, stage, micro-batch), whatever the schedule.
    """

    def __init__(
        self, config: Config, blueprint: Blueprint, blocks: Blocks, task: Task, runtime: Runtime, *others: Any
    ) -> None:  # fmt: skip
        there_and_back = config.parallel.schedule in SPLIT_BACKWARD
        self.placement = Placement(runtime.pipeline_ranks, config.parallel.per_rank, there_and_back)
        # Before blocks are wrapped: their forwards are still timm's.
        shape = blueprint.input_shape
        size, capacity = micro_batch(config, runtime.data_ranks, self.placement.ranks), None
        # With offloaded activations a stage needs less than is counted here.
        if runtime.device.type == "cuda" and not config.parallel.offloads_activations:
            capacity = USABLE * torch.cuda.get_device_properties(runtime.device).total_memory
        memory = StageMemory.of(
            config, self.placement, size, runtime.data_ranks, runtime.mesh["shard"].size(), capacity
        )  # fmt: skip
        sizes = list(other_sizes(config.data).values())
        self.plan = plan_stages(blueprint.module, blocks, shape, runtime.device, memory, sizes)
        super().__init__(config, blueprint, blocks, task, runtime, *others)
        self.eval_batch = config.train.global_batch // runtime.data_ranks // self.micro_batch * self.micro_batch
        self.notes.append(f"stages, for a micro-batch of {self.micro_batch} images:")
        self.notes += self.plan.table(self.micro_batch).split("\n")

    # What is where.

    def _build(self, blueprint: Blueprint, blocks: Sequence[nn.Module]) -> None:
        config, runtime, parallel = self.config, self.runtime, self.config.parallel
        numbers = self.placement.numbers(runtime.stage)
        self.stages = {number: self.plan.build(self.module, number) for number in numbers}
        self.parts = list(self.stages.values())
        self.group = runtime.mesh["stage"].get_group()
        self.schedules: dict[tuple[int, int, Size], Any] = {}
        self.passes: dict[int, int] = {}
        self.samples_of_pass = self.micro_batch
        pieces = [block.module for number in numbers for block in self.plan.blocks[number]]
        sharded = runtime.mesh["shard"].size() > 1
        self.computing.apply(self.parts, [piece for piece in pieces if piece in set(blocks)], not sharded, runtime.device)
        if self.branches is not None:
            # A cut may lie between the ends of a branch.
            self.branches.run_whole(block.path for stage in self.plan.blocks for block in stage)
        gathered = self.computing.dtype if sharded else torch.float32
        offload = make_offload(config, runtime.device) if self.trains else None
        self.notes += wrap_blocks(
            pieces, config, runtime.device, self.module, self.input_shape, self.branches, offload, gathered
        )
        for number, stage in self.stages.items():
            stage.around = lambda number=number: self._surroundings(number)
            stage.apart = parallel.schedule in SPLIT_BACKWARD
            last = number == self.placement.stages - 1
            stage.travels_as = None if self.computing.dtype == torch.float32 or last else self.computing.dtype
        if sharded:
            spread = shard(self.module, self.parts, pieces, config, self.computing.dtype, runtime)
        else:
            spread = replicate(self.module, self.parts, runtime)
        spread.tensors = self._tensors
        self.stepper = NativeStep(spread, blueprint, config, runtime, self.restoring, self.trains)

    def _tensors(self) -> dict[str, Tensor]:
        found = {name: tensor.to("meta") for name, tensor in self.module.state_dict().items()}
        for number, stage in self.stages.items():
            for name, tensor in stage.state_dict(keep_vars=True).items():
                if self.plan.owners[name][0] == number:  # of a buffer that several stages read, the first is saved
                    found[name] = tensor
        return found

    # The passes.

    def _passes(self, batch: Batch | StepBatch, factor: Tensor | float) -> Tensor:
        batch = self._on_device(batch.whole())  # a schedule of torch's takes all micro-batches at once
        self.passes = dict.fromkeys(self.stages, 0)
        self.loss_factor = factor * self.stepper.scale.factor
        parameters = list(self.stepper.held.values())
        images, image_size = self._inputs(batch) if 0 in self.stages else None, self._size(batch)
        self.targets, begin = self._loss_targets(batch), 0
        whole, rest = divmod(len(batch), self.micro_batch)
        for count, size in ((whole, self.micro_batch), (1, rest)):
            if not count or not size:
                continue
            self.samples_of_pass = size
            before: dict[nn.Parameter, Tensor] = {}
            key = count, size, image_size
            if key not in self.schedules:
                self.schedules[key] = self._schedule(*key)
                # A schedule that runs for the first time forgets the gradients of sharded stages so far.
                before = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
                for parameter in before:
                    parameter.grad = None
            mine = slice(begin, begin + count * size)
            arguments = () if images is None else (images[mine],)
            # The schedule cuts one tensor into views of it. Their offsets are places in the batch, for targets of any kind.
            target = torch.empty(len(batch))[mine] if self.placement.stages - 1 in self.stages else None
            with _unwrapped():
                self.schedules[key].step(*arguments, target=target, return_outputs=False)
            begin += count * size
            for parameter, grad in before.items():
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        for parameter in parameters:
            # Where torch takes backward passes apart they lie as the kernels made them; fused optimizers read both alike.
            if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
        return sum((loss for loss, _ in self.checks), torch.zeros((), dtype=torch.float64, device=self.runtime.device))

    def _size(self, batch: Batch) -> Size:
        """Height and width of the images of *batch*, which all stages take from now on."""
        height, width = batch.images.shape[-2:]
        if (True, (height, width)) not in self.plan.sends:
            planned = either([f"{size[0]} x {size[1]}" for training, size in self.plan.sends if training])
            raise UserError(
                f"parallel.strategy: pipeline has stages for images of {planned}, but these are {height} x {width}: name that "
                "size in data.resize_schedule or data.val_size"
            )
        for stage in self.stages.values():
            stage.image_size = (height, width)
        return height, width

    def _schedule(self, count: int, size: int, image_size: Size) -> Any:
        """A schedule of *count* micro-batches of *size* samples."""

        def loss(outputs: Tensor, places: Tensor) -> Tensor:
            begin = places.storage_offset()
            targets = each_tensor(lambda tensor: tensor[begin : begin + len(places)], self.targets)
            loss = self._loss(outputs, targets)
            self.checks.append((loss.detach(), finite_samples(outputs, len(places), self.runtime.device)))
            return loss * self.loss_factor

        sends = self.plan.sends[True, image_size]
        values = [tuple(spec.empty(size, self.computing.dtype) for spec in specs) for specs in sends]
        values.insert(0, (torch.empty(size, self.input_shape[0], *image_size, device="meta"),))
        return make_schedule(self.config.parallel.schedule, self.stages, values, self.placement, count, self.group, loss)

    @contextmanager
    def _surroundings(self, number: int) -> Iterator[None]:
        if self.stages[number].training:
            place = (self.config.seed, self.step, self.runtime.data_rank, number, self.passes[number])
            seed_dropout(self.runtime.device, *place)
            self._draw(self.samples_of_pass, self.passes[number])
            self.passes[number] += 1
        autocast = torch.autocast(self.runtime.device.type, self.computing.dtype) if self.computing.autocast else nullcontext()
        with mark(FORWARD), autocast:
            yield

    def _evaluate(self, batch: Batch, take: Callable[[Any, Batch], object]) -> None:
        """Forward passes alone. In each turn every stage takes the micro-batch that its predecessor had in the turn before.

        What is sent and received in a turn is one group: NCCL would run single transfers one after the other, and two ranks
        with several stages each would wait for each other.
        """
        last, device = self.placement.stages - 1, self.runtime.device
        arrived: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        parts, image_size = batch.split(self.micro_batch), self._size(batch)
        for turn in range(len(parts) + last):
            transfers: list[dist.P2POp] = []
            # The last stage first, so that what arrives from a stage of this rank is of the turn before.
            for number in sorted(self.stages, reverse=True):
                index = turn - number
                if 0 <= index < len(parts):
                    received = arrived.pop((number, index)) if number else (self._inputs(parts[index]),)
                    outputs = self.stages[number](*received)
                    if number == last:
                        take(outputs, parts[index])
                    elif number + 1 in self.stages:
                        arrived[number + 1, index] = outputs
                    else:
                        transfers += [dist.P2POp(dist.isend, t, self._peer(number + 1), self.group) for t in outputs]
                following = index + 1
                if number and number - 1 not in self.stages and 0 <= following < len(parts):
                    specs, samples = self.plan.sends[False, image_size][number - 1], len(parts[following])
                    tensors = tuple(spec.empty(samples, self.computing.dtype, device) for spec in specs)
                    arrived[number, following] = tensors
                    transfers += [dist.P2POp(dist.irecv, t, self._peer(number - 1), self.group) for t in tensors]
            for work in dist.batch_isend_irecv(transfers) if transfers else ():
                work.wait()

    def _peer(self, number: int) -> int:
        """The rank, among all, of stage *number* of this pipeline."""
        return dist.get_global_rank(self.group, self.placement.rank_of(number))

    @property
    def place(self) -> str:
        mine = " and ".join(map(str, self.stages))
        peers = sorted({near for number in self.stages for near in (number - 1, number + 1)} - set(self.stages))
        others = ", ".join(f"stage {peer} on rank {self._peer(peer)}" for peer in peers if 0 <= peer < self.placement.stages)
        return f"stage {mine} on rank {self.runtime.rank}, beside {others}"


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Let an error within a stage be itself: torch puts it behind one that tells the shapes of what the stage was given."""
    try:
        yield
    except RuntimeError as error:
        own: BaseException = error
        while own.__cause__ is not None and "failed to run" in str(own).lower():
            own = own.__cause__
        if own is error:
            raise
        raise own from None
