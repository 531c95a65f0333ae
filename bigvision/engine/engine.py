"""The engine of all strategies: micro-batches forward and backward, then an update; and evaluation, state, counters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bigvision.config import Config, micro_batch, other_sizes, peak_rate
from bigvision.data.batch import Batch, StepBatch
from bigvision.engine.ema import Ema, never_averaged
from bigvision.engine.graphs import Graphs
from bigvision.engine.parallelize import (
    choose_computing,
    make_offload,
    overlap,
    replicate,
    shard,
    synchronize_norms,
    why_eager,
    wrap_blocks,
)
from bigvision.engine.state import RUNNING, average, make_contiguous
from bigvision.engine.step import REQUESTS, Metrics, NativeStep, Record, StepResult, reduce_with, seed_dropout
from bigvision.engine.teacher import Teacher
from bigvision.errors import UserError
from bigvision.fragments import Fragment
from bigvision.models import Blocks, Blueprint, SkippedBranches
from bigvision.models.branches import dropping
from bigvision.models.float8 import check_float8
from bigvision.models.formats import hold_frozen
from bigvision.optim import group_table, learning_rate
from bigvision.ranges import BACKWARD, EMA, FORWARD, GRAPH, mark
from bigvision.runtime import Runtime
from bigvision.samples import Targets, each_tensor
from bigvision.tasks import Task


class Engine:
    """A timm model, its optimizer and everything between a batch and the next weights, under ddp and fsdp.

    Others differ in how the model is built (`_build`) and may differ in how micro-batches run (`_passes`, `_measure`).
    """

    module: nn.Module  # the whole model; on meta, but for what this rank holds
    parts: list[nn.Module]  # what this rank runs of it: the module itself, or stages
    forward: Any  # what is called in a step: the module, or what a strategy wrapped around it
    stepper: Any  # a `NativeStep`, or ZeRO's step with the same methods
    ema: Ema | None = None  # the average of the weights, where the run keeps one
    graphs: Graphs | None = None  # runs the passes of micro-batches, where they are captured
    teacher: Teacher | None = None  # a frozen model whose outputs the task's loss gets too
    step: int = 0  # batches taken, also those that were skipped or passed over
    samples: int = 0  # samples consumed: the whole state of the data
    statistics_differ: bool = False  # whether running statistics are each rank's own, until :meth:`synchronize`
    eval_batch: int  # samples that :meth:`eval_step` should be given on each rank
    notes: list[str]  # what the user should know of how the model is spread
    branches: SkippedBranches | None = None  # residual branches that run on a part of the samples
    requests: frozenset[str] = frozenset()  # what this rank asks the others for (of `REQUESTS`) with its next batch
    place: str = ""  # for errors: this rank's part of the model, and its neighbours; empty where all have the same
    local_first: bool = False  # whether a rank works for itself until the last backward pass

    def __init__(
        self, config: Config, blueprint: Blueprint, blocks: Blocks, task: Task, runtime: Runtime, steps: int, restored: bool,
        trains: bool = True,
    ) -> None:  # fmt: skip
        """Place and initialise the model; raise `UserError` when there is nothing to train.

        *steps* are those of the whole run, for the schedule. If a checkpoint will be *restored*, first values are not computed.
        Unless it *trains*, nothing is run in training mode.
        """
        self.config, self.task, self.runtime, self.steps = config, task, runtime, steps
        self.restoring, self.trains = restored, trains
        self.optim = replace(config.optim, lr=peak_rate(config.optim, config.train.global_batch))
        self.micro_batch = micro_batch(config, runtime.data_ranks, runtime.pipeline_ranks)
        self.eval_batch = self.micro_batch
        self.checks: list[tuple[Tensor, Tensor]] = []
        self.input_shape = blueprint.input_shape
        self.mean = torch.tensor(blueprint.mean, device=runtime.device)
        self.std = torch.tensor(blueprint.std, device=runtime.device)
        self._buffer: Tensor | None = None
        self._copying = torch.cuda.Stream(runtime.device) if runtime.device.type == "cuda" else None
        self._skipped, self._pending = 0, None
        self._rows: list[Tensor] = []  # of the batch that is being measured
        if config.parallel.precision == "fp32":
            # Convolutions would else round their inputs to 10 bits on CUDA, and the strategies differ in the third digit.
            torch.backends.cudnn.allow_tf32 = False
        self.module = blueprint.module
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            raise UserError(f"model.name: all parameters of {config.model.name} are frozen: leave some with requires_grad=True")
        channels_last = make_contiguous(self.module)
        self.computing = choose_computing(config, blueprint, blocks, runtime.device, channels_last, self.micro_batch)
        self.notes = [self.computing.note] if self.computing.note else []
        if self.computing.float8 is not None:
            if self.computing.float8.names:
                check_float8(runtime.device)  # also where a checkpoint is evaluated on another device
            self.notes.append(self.computing.float8.note)
        if config.optim.lr_base_size is not None and trains:
            root = "the root of " if config.optim.lr_base_scale == "sqrt" else ""
            self.notes.append(
                f"peak learning rate: {self.optim.lr:g}, which is optim.lr: {config.optim.lr:g} times {root}"
                f"train.global_batch: {config.train.global_batch} / optim.lr_base_size: {config.optim.lr_base_size}"
            )
        if (config.optim.groups or config.model.trainable != "all" or config.model.lora) and trains:
            self.notes += group_table(self.module, config.optim)
        self.parts = [self.module]
        if config.model.sync_batchnorm:
            self.notes += synchronize_norms(self.module, runtime)
        if config.model.frozen_dtype == "bf16":
            self.notes.append(hold_frozen(self.module, self.input_shape))
        self.module.train()
        if config.model.drop_path_mode != "mask" and trains and dropping(self.module):
            compiled = why_eager(config, [block.module for block in blocks], runtime.device) is None
            sizes = dict.fromkeys([self.input_shape[1:], *other_sizes(config.data).values()])
            shapes = [(self.input_shape[0], *size) for size in sizes]
            self.branches, note = SkippedBranches.of(self.module, blocks, shapes, runtime.device, compiled, self.micro_batch)
            self.notes.append(note)
        self._build(blueprint, [block.module for block in blocks])
        self._set_mode(training=True)
        if config.ema.decay is not None and trains:
            self.ema = Ema(config.ema, self.stepper.model_fragments(), never_averaged(self.module), runtime)

    def _build(self, blueprint: Blueprint, blocks: list[nn.Module]) -> None:
        """Spread the model, still on meta, over the ranks, make the optimizer and give both their first values."""
        config, runtime, parallel = self.config, self.runtime, self.config.parallel
        sharded = parallel.strategy == "fsdp" and runtime.world_size > 1
        self.computing.apply(self.parts, blocks, not sharded, runtime.device)
        gathered = self.computing.dtype if sharded else torch.float32
        offload = make_offload(config, runtime.device) if self.trains else None
        self.notes += wrap_blocks(
            blocks, config, runtime.device, self.module, self.input_shape, self.branches, offload, gathered
        )
        if sharded:
            spread = shard(self.module, self.parts, blocks, config, self.computing.dtype, runtime)
        else:
            spread = replicate(self.module, self.parts, runtime)
        self.stepper = NativeStep(spread, blueprint, config, runtime, self.restoring, self.trains)
        if not sharded and runtime.world_size > 1 and self.trains:
            self._set_mode(training=True)  # frozen norms
            layout = torch.channels_last if self.computing.channels_last else torch.contiguous_format
            example = torch.zeros(min(2, self.micro_batch), *self.input_shape, device=runtime.device)
            overlap(spread, example.contiguous(memory_format=layout), self.stepper.statistics, parallel.reduce)
        self.forward, self.local_first = spread.forward, not sharded
        if parallel.cuda_graphs and self.trains:
            sizes = 1 + len(set(other_sizes(config.data).values()))
            self.graphs = Graphs(self._pass, self.parts, runtime.device, config.model.name, 2 * sizes)
            if self.branches is not None:
                self.branches.fixed = True

    # The step.

    def train_step(self, batch: Batch | StepBatch) -> StepResult:
        """Take one optimizer step on this rank's part of the global batch. Every rank calls it with as many samples.

        It returns when the work is launched; at most one step is under way beside it.
        """
        self._set_mode(training=True)
        seed_dropout(self.runtime.device, self.config.seed, self.step, self.runtime.data_rank)
        self.stepper.statistics.keep()
        self.checks = checks = []
        self._local: Any = None
        began, waited = self._moment(), batch.waited
        samples = len(batch) * self.runtime.data_ranks
        with no_autocast(self.runtime.device):
            batch, weight = self._weighed(batch)
            self._scale = weight / samples
            # Strategies average gradients over ranks; what is wanted is the sum of all samples' over their weight.
            loss_sum = self._passes(batch, self.runtime.data_ranks / weight)
            if self.branches is not None:
                self.branches.clear()
        # The rate follows the count of applied steps. The record of the step before arrived while this one was launched.
        lr = self._rate()
        numbers = self.stepper.update(loss_sum, weight, lr, self.requests)
        self.step, self.samples, self.statistics_differ = self.step + 1, self.samples + samples, True
        if self.ema is not None:
            with mark(EMA):
                self.ema.update(numbers[2], self.step)
        local, ids, waited = self._local, batch.ids, batch.waited - waited
        self._pending = StepResult(
            numbers[0], numbers[1], lr, samples, self.step, self.samples, Record(numbers),
            lambda: offenders(checks, ids), lambda: max(0.0, _seconds(began, local) - waited),
        )  # fmt: skip
        return self._pending

    def pass_over(self, batch: Batch | StepBatch) -> StepResult:
        """Count a batch as a skipped step, and do nothing with it."""
        lr, samples = self._rate(), len(batch) * self.runtime.data_ranks
        self._skipped += 1
        self.step, self.samples = self.step + 1, self.samples + samples
        numbers = torch.tensor([math.nan, math.nan, 1.0, 0.0, *(0.0 for _ in REQUESTS)], dtype=torch.float64)
        return StepResult(numbers[0], numbers[1], lr, samples, self.step, self.samples, Record(numbers), passed_over=True)

    @property
    def skipped(self) -> int:
        """Batches without an optimizer step; waits for the last step. The learning rate is that of step - skipped."""
        if self._pending is not None:
            self._skipped += self._pending.skipped
            self._pending = None
        return self._skipped

    def _rate(self) -> float:
        """The learning rate; a skipped step leaves its own to the next one."""
        return learning_rate(self.optim, self.step - self.skipped, self.steps)

    def _weighed(self, batch: Batch | StepBatch) -> tuple[Batch | StepBatch, Tensor | int]:
        """*batch* and what the losses of the global batch are divided by: its samples, or the sum of the task's weights."""
        if not self.task.weighed:
            return batch, len(batch) * self.runtime.data_ranks
        # The first backward pass needs the sum: all of a rank's samples are waited for.
        batch = self._on_device(batch.whole())
        weight = self.task.weight(self._loss_targets(batch))
        if weight is None:
            return batch, len(batch) * self.runtime.data_ranks
        weight = weight.detach().double().clone()
        if self.runtime.data_ranks > 1:
            dist.all_reduce(weight, group=self.runtime.data_group)
        # Without anything to learn the losses are 0.
        return batch, torch.where(weight > 0, weight, 1.0)

    def _passes(self, batch: Batch | StepBatch, factor: Tensor | float) -> Tensor:
        """Run all micro-batches of *batch*, with gradients times *factor*; return the sum of its losses, float64 and 0-D."""
        count = -(-len(batch) // self.micro_batch)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        for number, part in enumerate(batch.split(self.micro_batch), start=1):
            part = self._on_device(part)
            self._draw(len(part), number - 1)
            with self.stepper.around(number == count):
                if self.graphs is not None:
                    with mark(GRAPH):
                        loss, finite = self.graphs(part, factor, self._scale)
                else:
                    loss, finite = self._pass(part, factor, self._scale)
            self.checks.append((loss, finite))
            loss_sum += loss
        return loss_sum

    def _pass(self, part: Batch, factor: Tensor | float, scale: Tensor | float) -> tuple[Tensor, Tensor]:
        """Run a micro-batch forward and backward; return its loss, which samples' outputs are finite, and no gradients."""
        with mark(FORWARD):
            told = self.teacher(part) if self.teacher is not None else None
            outputs = self.forward(self._inputs(part))
            if self.local_first and self.graphs is None:
                self._local = self._moment()  # the last backward pass is the first to exchange anything
            finite = finite_samples(outputs, len(part), self.runtime.device)
            loss = self._loss(outputs, self._loss_targets(part), told, scale)
        del outputs, told  # maps of class scores may be larger than what the backward pass needs
        with mark(BACKWARD):
            self.stepper.backward(loss, factor)
        return loss.detach(), finite

    def _draw(self, samples: int, number: int) -> None:
        """Draw which samples residual branches leave out of the step's micro-batch *number*, of so many *samples*."""
        if self.branches is not None:
            self.branches.draw(samples, self.config.seed, self.step, self.runtime.data_rank, number)

    def _loss_targets(self, batch: Batch) -> Targets:
        """What the task's loss gets."""
        return batch.targets if batch.mix is None else self.task.mixed(batch.targets, batch.mix.partners, batch.mix.share)

    def _loss(self, outputs: Any, targets: Targets, told: Any = None, scale: Tensor | float = 1.0) -> Tensor:
        """The sum of the task's losses. *told* is the teacher's output, *scale* what such a loss is multiplied with."""
        if self.teacher is not None:
            return self.task.loss_with_teacher(outputs, targets, told, scale)
        if self.task.span == "global batch" and (ranks := self.runtime.data_ranks) > 1:
            everyone = partial(_AllSamples.apply, self.runtime.data_group, self.runtime.data_rank, ranks)
            # Each rank computes the sum of all samples.
            return self.task.loss(each_tensor(everyone, outputs), each_tensor(everyone, targets)) / ranks
        return self.task.loss(outputs, targets)

    def _on_device(self, batch: Batch) -> Batch:
        """*batch* on the device; the copy runs beside what was launched before."""
        if self._copying is None:
            return batch.to(self.runtime.device)
        with torch.cuda.stream(self._copying):
            batch = batch.to(self.runtime.device)
        current = torch.cuda.current_stream()
        current.wait_stream(self._copying)
        for tensor in batch.tensors():
            tensor.record_stream(current)
        return batch

    def _inputs(self, batch: Batch) -> Tensor:
        """The images as the model gets them, until the next batch's."""
        images = batch.inputs(self.mean, self.std, self._buffer, self.computing.channels_last)
        if self.runtime.device.type == "cpu" and batch.mix is None:
            # Reused across steps: a fresh allocation would page-fault on first touch, which takes longer than the arithmetic.
            self._buffer = images
        return images

    def _moment(self) -> Any:
        """Now, for a device's own work: seconds, or an event in its stream."""
        if self.runtime.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _set_mode(self, training: bool) -> None:
        for part in self.parts:
            if part.training != training:
                part.train(training)
        for norm in self.stepper.statistics.frozen:
            norm.training = False

    # Evaluation.

    def eval_step(self, batch: Batch, also: Callable[[Any, Batch], object] | None = None) -> Metrics:
        """Return metrics of all ranks' batches. Every rank calls it with as many samples; padding is not counted.

        *also* is called with the model's outputs and the samples that they are of, where this rank has outputs.
        """
        self._set_mode(training=False)
        with torch.no_grad(), no_autocast(self.runtime.device):
            sums = torch.zeros(self.task.sums + 1, dtype=torch.float64, device=self.runtime.device)

            def take(outputs: Any, part: Batch) -> None:
                sums.add_(self._measured(outputs, part))
                if also is not None:
                    also(outputs, part)

            self._evaluate(self._on_device(batch), take)
            totals = reduce_with(self.requests, sums)
        count, rows, self._rows = self.task.sums, tuple(self._rows), []
        return Metrics(self.task, totals[:count], totals[count], Record(totals[count + 1 :]), rows)

    def predict_step(self, batch: Batch, mirrored: bool = False) -> list[Any]:
        """Return the task's scores of this rank's samples, in parts; nothing on a rank that has no outputs.

        Every rank calls it with as many samples. Scores are the mean over the image and its mirror image where *mirrored*.
        """
        self._set_mode(training=False)
        found: list[Any] = []
        with torch.no_grad(), no_autocast(self.runtime.device):
            batch = self._on_device(batch)
            self._evaluate(batch, lambda outputs, part: found.append(self.task.scores(outputs)))
            if mirrored:
                others: list[Any] = []
                batch = replace(batch, images=batch.images.flip(-1))
                self._evaluate(batch, lambda outputs, part: others.append(self.task.mirrored(self.task.scores(outputs))))
                found = [(one + other) / 2 for one, other in zip(found, others, strict=True)]
        return found

    def _evaluate(self, batch: Batch, take: Callable[[Any, Batch], object]) -> None:
        """Pass *batch* forward, and *take* its outputs, or those of one part after the other, where there are any."""
        take(self.forward(self._inputs(batch)), batch)

    def _measured(self, outputs: Any, batch: Batch) -> Tensor:
        """The sums that the task measures over samples, and their number, float64 (sums + 1,)."""
        sums = self.task.measure(outputs, batch.targets, batch.valid)
        if self.task.keeps_rows:
            ids = torch.where(batch.valid, batch.ids.double(), math.nan)
            self._rows.append(torch.cat([ids[:, None], self.task.rows(outputs, batch.targets).double()], dim=1))
        return torch.cat([sums, batch.valid.sum(dtype=torch.float64)[None]])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate with the averaged weights; the weights are back afterwards. Called on every rank."""
        assert self.ema is not None
        self.synchronize()
        self.ema.swap()
        self.refresh()
        yield
        # Not after an error: `refresh` may communicate, and would wait for ranks that are gone.
        self.ema.swap()
        self.refresh()

    # The state.

    def synchronize(self) -> None:
        """Make running statistics the same on all ranks. Called on every rank before evaluation and saving."""
        if self.statistics_differ:  # once only: the mean of equal numbers may differ from them in its last bit
            # Each rank's batches moved its own running statistics; their mean is what one rank would keep on average.
            average(self.stepper.statistics.running, self.runtime)
            if self.ema is not None:
                self.ema.synchronize()
            self.statistics_differ = False

    def fragments(self) -> Iterator[Fragment]:
        """Yield live views of all that this rank holds; writing to them restores."""
        yield from self.stepper.model_fragments()
        yield from self.stepper.optimizer_fragments()
        if self.ema is not None:
            yield from self.ema.fragments()

    def copies(self) -> Iterator[Fragment]:
        """Yield what other ranks hold as well; running statistics only while they are the same on all."""
        for fragment in self.fragments():
            differs = self.statistics_differ and fragment.name.rpartition(".")[2] in RUNNING
            if fragment.copy[1] > 1 and fragment.values.numel() and not differs:
                yield fragment
        yield from self.stepper.copies()

    def scalars(self) -> dict[str, Any]:
        """What of the state is not a tensor, as JSON. Waits for the last step."""
        averages = {"ema_updates": int(self.ema.updates)} if self.ema is not None else {}
        taught = {"teacher": self.teacher.fingerprint} if self.teacher is not None else {}
        return (
            {"step": self.step, "skipped": self.skipped, "samples": self.samples} | self.stepper.scalars() | averages | taught
        )

    def restored(self, scalars: dict[str, Any]) -> None:
        """Take over *scalars* and :meth:`refresh`; called after all fragments were written.

        Raises `UserError` where they are of a run with another teacher.
        """
        if self.teacher is not None:
            self.teacher.check(scalars.get("teacher"))
        self.step, self.samples, self._pending = scalars["step"], scalars["samples"], None
        self._skipped = scalars.get("skipped", 0)  # older checkpoints have none
        self.statistics_differ = False
        self.stepper.restored(scalars)
        if self.ema is not None:
            self.ema.restored(scalars.get("ema_updates"))
        self.refresh()

    def refresh(self) -> None:
        """Bring what derives from the fragments up to date: called after they were written, by :meth:`restored` too."""
        self.stepper.refresh()

    def close(self) -> None:
        """Release what outlives the engine otherwise; it is not used afterwards."""
        self.stepper.close()


def offenders(checks: list[tuple[Tensor, Tensor]], ids: Tensor) -> list[int]:
    """Of the samples *ids* of a step, those whose loss is not finite, or all of their micro-batch (`StepResult.offending`)."""
    found: list[int] = []
    for loss, finite in checks:
        part, ids = ids[: len(finite)], ids[len(finite) :]
        if not torch.isfinite(loss):
            found += part[~finite.to(part.device)].tolist() or part.tolist()
    return found


def finite_samples(outputs: Any, samples: int, device: torch.device) -> Tensor:
    """Of which of so many *samples* all *outputs* are finite, bool (samples,); a tensor that is not by sample is of all.

    A model of the user's own may return what has no tensors that can be found, such as a dataclass: then the loss alone tells.
    """
    found = torch.ones(samples, dtype=torch.bool, device=device)

    def look(tensor: Tensor) -> None:
        finite = torch.isfinite(tensor.detach())
        by_sample = finite.ndim > 0 and len(finite) == samples
        found.logical_and_(finite.reshape(samples, -1).all(1) if by_sample and finite.numel() else finite.all())

    each_tensor(look, outputs)
    return found


class _AllSamples(torch.autograd.Function):
    """The samples of all data-parallel ranks, in their order; the gradient is that of this rank's, as each rank has all of it.

    Times the number of ranks, since each computes the loss of all samples and counts its own share of it.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup | None, rank: int, ranks: int, mine: Tensor) -> Tensor:
        ctx.rank, ctx.ranks, ctx.count = rank, ranks, len(mine)
        everyone = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(everyone, mine.contiguous(), group)
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, Tensor]:
        (gradient,) = gradients
        return None, None, None, gradient[ctx.rank * ctx.count :][: ctx.count] * ctx.ranks


def _seconds(began: Any, local: Any) -> float:
    if local is None:
        return 0.0
    return local - began if isinstance(began, float) else began.elapsed_time(local) / 1000


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch a caller's autocast off: what is computed in which format is decided here alone."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
