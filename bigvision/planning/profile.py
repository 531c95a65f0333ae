"""What one training step of a model computes, moves and keeps, counted on the meta device.

The model is built as the engine builds it (number format, frozen parts, adapters, recompute, the task's loss) and runs forward
and backward without memory. Each allocation of the two passes is recorded in its order, divided into what is fixed and what
belongs to the images, so that one profile gives the memory of every micro-batch.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any
from weakref import WeakKeyDictionary

import timm.models
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from bigvision.config import Config, other_sizes, pair
from bigvision.engine.ema import never_averaged
from bigvision.engine.engine import finite_samples
from bigvision.engine.parallelize import Computing, choose_computing, why_eager, wrap_blocks
from bigvision.engine.state import RUNNING, allocate, is_frozen, make_contiguous
from bigvision.engine.teacher import precision_of_teacher
from bigvision.models import (
    Block,
    Blocks,
    Blueprint,
    blueprint,
    find_blocks,
    find_teacher,
    kept_samples,
    kinds,
    rates_of_branches,
)
from bigvision.models.alike import tensors_in
from bigvision.models.arguments import current_name
from bigvision.models.formats import hold_frozen
from bigvision.models.offload import LEAST, Offload
from bigvision.models.tracing import FusedAttention, named_tensors, plain_attributes
from bigvision.optim import freeze, parameter_groups
from bigvision.planning.compiled import compile_without_code
from bigvision.planning.operations import IMAGES, NOTHING, Amount, Work, fused, per_image
from bigvision.planning.recorder import Counted, Recorder, Recording, Span, spans, step_bytes
from bigvision.planning.repeats import OFFLOADED, REACH, extended, leave_out, runs_of
from bigvision.tasks import Classify, Task, build_task

USUAL = 64
"""Images of a micro-batch for which it is asked what is too small to be offloaded."""
FUSED = ("adamw", "sgd")
"""Optimizers whose step is one kernel, which allocates nothing."""


@dataclass(frozen=True)
class StateTensor:
    """One parameter or buffer of the model, whole."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    buffer: bool = False
    saved: bool = True
    """Whether checkpoints have it; persistent buffers and parameters are."""
    running: bool = False
    """Whether a forward pass changes it (BatchNorm's statistics)."""
    whole: bool = False
    """Whether ``fully_shard`` leaves it whole on every rank: a scalar, or BatchNorm's."""
    computes: torch.dtype = torch.float32
    """The type in which it is multiplied."""
    averaged: bool = False
    """Whether an EMA follows it."""

    @functools.cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Part:
    """One block, or what runs between two blocks."""

    path: str
    """Of the block; empty for what lies outside of blocks."""
    kind: int
    """Equal blocks have the same number; what lies outside of blocks has a negative one."""
    tensors: tuple[StateTensor, ...]
    forward_flops: float = 0.0
    """For one image."""
    backward_flops: float = 0.0
    """For one image, without what is recomputed."""
    recomputed_flops: float = 0.0
    """For one image, in the backward pass: less than the forward pass's, since the last operations are left out."""
    forward_bytes: Amount = NOTHING
    """Read and written by the operations of the pass."""
    backward_bytes: Amount = NOTHING
    recomputed_bytes: Amount = NOTHING
    saved: Amount = NOTHING
    """Bytes that are kept from the forward pass to the backward pass, with the output."""
    input_bytes: float = 0.0
    """For one image."""
    output_bytes: float = 0.0
    """For one image."""
    forward_operations: tuple[Work, ...] = ()
    """Of compiled blocks as compiled code runs them."""
    backward_operations: tuple[Work, ...] = ()
    """Without what is recomputed."""
    leaves: Amount = NOTHING
    """Bytes of offloaded activations of an earlier part that begin to leave when its forward pass begins."""
    returns: Amount = NOTHING
    """Bytes that begin to come back when its backward pass begins."""
    branches: tuple[float, ...] = ()
    """Rates of its branches under ``model.drop_path_mode: skip``; 0 for one that runs on all samples.

    What is counted above is as if all did."""

    def kept(self, images: float) -> float:
        """On how many of so many *images* of a micro-batch it runs: the mean of its branches, which are taken for all of it."""
        if not self.branches:
            return images
        return fmean(kept_samples(round(images), rate) or images for rate in self.branches)

    @property
    def numel(self) -> int:
        """Elements of the parameters."""
        return sum(tensor.numel for tensor in self.tensors if not tensor.buffer)

    @property
    def trained(self) -> int:
        """Elements of the trained parameters."""
        return sum(tensor.numel for tensor in self.tensors if tensor.trained)


@dataclass(frozen=True)
class Profile:
    """A training step of one micro-batch."""

    parts: tuple[Part, ...]
    """In the order of the forward pass. Each tensor is in one; those that lie outside of blocks where they are used first."""
    spans: tuple[Span, ...]
    """In the order of the step: forward passes, then backward passes."""
    groups: tuple[tuple[str, ...], ...]
    """The names in each of the optimizer's parameter groups."""
    image: tuple[int, int, int]
    """Channels, height and width."""
    compute: torch.dtype
    device: str
    """The type of the device: cpu or cuda."""
    casts: bool
    """Whether weights are cast where they are read; otherwise the strategy holds or gathers them in the compute type."""
    compiled: bool
    targets: float
    """Bytes of the targets of an image."""
    update: float = 0.0
    """Bytes that the optimizer's step allocates, if a rank steps all of the model."""
    autocast: bool = False
    task: int = 0
    """Bytes of what the task keeps on the device: weights of classes, or mean and deviation of numbers."""
    weighed: bool = False
    """Whether its samples have weights."""
    unused: bool = False
    """Whether a trained parameter gets no gradient: then DistributedDataParallel keeps a map of those that get one."""
    model: nn.Module | None = None
    """On meta, as it is before anything is applied; what pipelines are cut from."""
    teacher: Profile | None = None
    """Of the task's teacher: forward passes alone."""

    @property
    def tensors(self) -> tuple[StateTensor, ...]:
        return tuple(tensor for part in self.parts for tensor in part.tensors)

    @property
    def parameters(self) -> int:
        return sum(part.numel for part in self.parts)

    @property
    def flops(self) -> float:
        """Of the forward and the backward pass of an image, without what is recomputed, if no branch leaves it out."""
        return sum(part.forward_flops + part.backward_flops for part in self.parts)

    def flops_in(self, images: int) -> float:
        """The same in a micro-batch of so many *images*, some of which branches leave out."""
        return sum((part.forward_flops + part.backward_flops) * part.kept(images) / images for part in self.parts)


def profile(
    config: Config, outputs: int | None = None, task: Task | None = None, plan: tuple[Blueprint, Blocks] | None = None
) -> Profile:  # fmt: skip
    """Count a training step of *config* on the type of device that ``parallel.device`` names (auto: cuda).

    *outputs* are the data's classes or numbers; None takes ``model.num_classes``, or as many as timm's model has. *task* is the
    caller's own. *plan* is what `planned` returned, which is copied. Nothing is allocated, started or compiled.
    """
    learned = build_task(config.task, task)
    made, blocks = planned(config, outputs, learned) if plan is None else plan
    teacher = _teacher(config, learned) if learned.teacher is not None else None
    return replace(_profile(config, made, blocks, learned), teacher=teacher)


def _teacher(config: Config, task: Task) -> Profile:
    """Of the teacher of *task*, as the engine builds it beside the student of *config*."""
    assert task.teacher is not None
    known, around = find_teacher(task.teacher), task.teacher_model()
    outputs = known.outputs if around is None else None
    model = replace(known.config, pretrained=False, weights=None, num_classes=outputs or 0)
    strategy = "fsdp" if config.parallel.strategy in ("fsdp", "zero3") else "ddp"
    config = precision_of_teacher(config)
    used = replace(
        config, model=model, data=replace(config.data, resize_schedule=()),
        parallel=replace(config.parallel, strategy=strategy, recompute="none", offload="none"),
    )  # fmt: skip
    plan = blueprint(model, outputs, around=around)
    plan.module.requires_grad_(False)
    return _profile(used, plan, find_blocks(plan.module, plan.image_size), task)


def _profile(config: Config, made: Blueprint, blocks: Blocks, learned: Task) -> Profile:
    rates = dict[str, list[float]]()
    if config.model.drop_path_mode == "skip":
        rates = rates_of_branches(made.module, [block.path for block in blocks], _largest(made.input_shape, config))
    budget = config.parallel.recompute.startswith("budget:")  # under which equal blocks keep one of two choices
    for short in (False,) if budget else (True, False):
        mine = copy.copy(made)
        mine.module = copy.deepcopy(made.module)
        copies = [replace(block, module=mine.module.get_submodule(block.path)) for block in blocks]
        found = Blocks(copies, blocks.graph, blocks.reason, blocks.max_share)
        recording = _Recording(config, mine, found, learned, short, _computing.setdefault(made.module, {}))
        try:
            counted = recording.profile()
            parts = [replace(part, branches=tuple(rates.get(part.path, ()))) for part in counted.parts]
            return replace(counted, parts=tuple(parts), model=made.module)
        except Exception:
            if not recording.runs:
                raise
            # What is left out is missed after all, or blocks that look equal are not.
    raise AssertionError("a model that is recorded whole has no runs")


def planned(config: Config, outputs: int | None, task: Task) -> tuple[Blueprint, Blocks]:
    """The model of *config* on meta with what is frozen in it, and its blocks; no weights are looked for."""
    model = replace(config.model, pretrained=False, weights=None)
    if outputs is None and config.model.num_classes is None:
        card = timm.models.get_pretrained_cfg(current_name(model.name)[0])
        outputs = (card.num_classes if card else None) or 1000
    plan = blueprint(model, config.model.num_classes or outputs, around=task.model(config), sizes=other_sizes(config.data))
    freeze(plan.module, config.model.trainable, plan.adapters)
    return plan, find_blocks(plan.module, plan.image_size)


def device_type(config: Config) -> str:
    """The type of the devices that are planned for."""
    return "cpu" if config.parallel.device == "cpu" else "cuda"


_computing: WeakKeyDictionary[nn.Module, dict[Any, Computing]] = WeakKeyDictionary()
"""How each model computes, by the number format that is asked for: to find out takes two passes."""


class _Recording:
    """A model prepared as the engine prepares it, without memory, and what its passes do."""

    def __init__(
        self, config: Config, plan: Blueprint, blocks: Blocks, task: Task, short: bool, known: dict[Any, Computing]
    ) -> None:  # fmt: skip
        """*short*: most of many equal blocks in a row are not run, see `repeats`. *known*: how it computes in which format."""
        self.config, self.task, self.device = config, task, device_type(config)
        self.module, parallel = plan.module, config.parallel
        self.target_bytes, self.task_bytes, self.unused = 0.0, 0, False
        self.blocks: list[Block] = list(blocks)
        modules = [block.module for block in blocks]
        channels_last = make_contiguous(self.module)
        target, here = torch.device(self.device), torch.device("cpu")
        size = config.train.micro_batch
        images = size if isinstance(size, int) else config.train.global_batch
        format: Any = parallel.precision, parallel.channels_last, self.device
        if parallel.precision == "fp8":
            format += parallel.fp8_layers, images
        if format not in known:
            known[format] = choose_computing(config, plan, blocks, target, channels_last, images)
        self.computing = known[format]
        if config.model.frozen_dtype == "bf16":
            hold_frozen(self.module, plan.input_shape)
        self.shape = _largest(plan.input_shape, config)
        held = {name: tensor.dtype for name, tensor in named_tensors(self.module)}
        optim = config.optim
        self.learns = any(parameter.requires_grad for parameter in self.module.parameters())
        """Whether it is no teacher."""
        groups = parameter_groups(self.module, optim.weight_decay, optim.layer_decay, rules=optim.groups) if self.learns else []
        self.groups = tuple(tuple(group["names"]) for group in groups)
        self.update = step_bytes(groups, optim) if self.learns and optim.name not in FUSED else 0
        self.compiled = why_eager(config, modules, target, missing=None) is None
        self.module.train(self.learns)
        # DeepSpeed holds, and fully_shard gathers, weights in the compute type.
        self.casts = not (parallel.strategy.startswith("zero") or parallel.strategy == "fsdp")
        self.computing.apply([self.module], modules, parallel.strategy != "fsdp", here)
        # Now, since blocks with layers in fp8 are others than those without.
        self.kinds = {module: number for number, group in enumerate(kinds(modules)) for module in group}
        self.norms = {id(p) for m in self.module.modules() if isinstance(m, BatchNorm) for p in m.parameters(recurse=False)}
        for parameter in self.module.parameters() if not self.casts else ():
            if parallel.strategy == "fsdp":
                changes = not self._whole(parameter) and self.computing.dtype != torch.float32
            else:
                changes = parameter.requires_grad or self.computing.dtype.itemsize <= parameter.dtype.itemsize
            if changes:
                parameter.data = parameter.data.to(self.computing.dtype)
        self.tensors = self._state(held)
        offloads = parallel.offloads_activations and self.learns
        self.runs = runs_of(self.module, self.blocks, self.kinds, OFFLOADED if offloads else REACH) if short else []
        self.recorded = leave_out(self.module, self.blocks, self.runs)
        modules = [block.module for block in self.recorded]
        self.attention = FusedAttention(self.device)
        for block in modules if parallel.recompute != "none" and not self.compiled else ():
            # A backward pass runs without the modes of functions that it was called in.
            block.forward = functools.partial(_within, self.attention, block.forward)
        eager = replace(config, parallel=replace(parallel, compile=False))
        self.host, offload = Counted(), None
        if offloads:
            offload = Offload(here, None, self.host, LEAST * IMAGES // USUAL)
            offload.kinds = (FakeTensor,)
        wrap_blocks(modules, eager, here, self.module, self.shape, offload=None if self.compiled else offload)
        if self.compiled:
            compile_without_code(modules, self.attention, parallel.recompute != "none")
            if offload is not None:
                for block in modules:
                    offload.wrap(block)

    def _whole(self, parameter: Tensor) -> bool:
        return parameter.ndim == 0 or id(parameter) in self.norms

    def _state(self, held: Mapping[str, torch.dtype]) -> dict[str, StateTensor]:
        """The parameters and buffers by name, each tied one once; *held*: the types in which they are saved."""
        found: dict[str, StateTensor] = {}
        saved = self.module.state_dict(keep_vars=True).keys()
        still = never_averaged(self.module)
        counted = {f"{path}.{name}" for path, part in self.module.named_modules() if isinstance(part, BatchNorm)
                   and not is_frozen(part) for name in (*RUNNING, "num_batches_tracked")}  # fmt: skip
        for name, p in self.module.named_parameters():
            computes = self.computing.dtype if self.casts and id(p) not in self.norms else p.dtype
            found[name] = StateTensor(
                name, tuple(p.shape), held[name], p.requires_grad, whole=self._whole(p), computes=computes,
                averaged=p.requires_grad,
            )  # fmt: skip
        for name, b in self.module.named_buffers():
            averaged = name in saved and b.is_floating_point() and name not in still
            found[name] = StateTensor(
                name, tuple(b.shape), b.dtype, False, True, name in saved, name in counted, True, b.dtype, averaged
            )  # fmt: skip
        return found

    def profile(self) -> Profile:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
            here = torch.device("cpu")
            allocate(self.module, here)
            for part in self.module.modules():
                for name, value in plain_attributes(part).items():
                    if type(value) is Tensor and value.is_meta:
                        setattr(part, name, torch.empty_like(value, device=here))
                if is_frozen(part):
                    part.training = False
            return self._summed(extended(self._record(), self.runs))

    def _record(self) -> Recording:
        """Run forward and backward."""
        layout = torch.channels_last if self.computing.channels_last else torch.contiguous_format
        images = torch.empty(IMAGES, *self.shape).contiguous(memory_format=layout)
        parameters = {p: name for name, p in self.module.named_parameters()}
        ignored = [images, *(tensor for _, tensor in named_tensors(self.module))]
        # One thread computes 1 x 1 convolutions of few images without oneDNN.
        size = self.config.train.micro_batch
        many = torch.get_num_threads() > 1 or not isinstance(size, int) or size >= 16
        recorder = Recorder(ignored, self.device == "cpu", many)
        self.host.recorder = recorder
        owned = {p for block in self.recorded for p in (*block.module.parameters(), *block.module.buffers())}
        recorder.watched = {
            t.untyped_storage()._cdata: name
            for name, t in (*self.module.named_parameters(), *self.module.named_buffers()) if t not in owned
        }  # fmt: skip
        hooks: list[Any] = []

        def before(number: int, block: nn.Module, inputs: Any) -> None:
            for leaf in tensors_in(inputs):
                if leaf.requires_grad and torch.is_grad_enabled():
                    leaf.register_hook(lambda _: recorder.leave(number))
            recorder.boundaries[number, False] = _for_an_image(inputs)
            recorder.enter(False, 2 * number + 1)

        def after(number: int, block: nn.Module, inputs: Any, output: Any) -> None:
            for leaf in tensors_in(output):
                if leaf.requires_grad:
                    leaf.register_hook(lambda _: recorder.enter(True, 2 * number + 1))
            recorder.boundaries[number, True] = _for_an_image(output)
            recorder.enter(False, 2 * number + 2)

        for number, block in enumerate(self.recorded):
            hooks.append(block.module.register_forward_pre_hook(functools.partial(before, number)))
            hooks.append(block.module.register_forward_hook(functools.partial(after, number)))
        hooks += [p.register_post_accumulate_grad_hook(recorder.gradient) for p in parameters if p.requires_grad]
        try:
            self.attention.counter = recorder
            # What it would free in a pass was not made there.
            with collector_paused(), recorder, self.attention:
                outputs = self.module(images)
                if self.learns:
                    loss = self._loss(outputs)
                    recorder.loss = loss
                    del outputs
                    recorder.enter(True, 2 * len(self.recorded))
                    loss.backward()
                recorder.enter(True, 0)
        finally:
            for hook in hooks:
                hook.remove()
        self.unused = any(p.grad is None for p in parameters if p.requires_grad) and self.learns
        for parameter in parameters:
            parameter.grad = None
        return recorder.finished()

    def _loss(self, outputs: Any) -> Tensor:
        """The task's loss, where its targets are known; else a sum over all outputs."""
        first = next(iter(tensors_in(outputs)))
        finite_samples(outputs, IMAGES, first.device)
        targets = example_targets(self.task, first, IMAGES, bool(self.config.task.mixup or self.config.task.cutmix))
        self.target_bytes = sum(one.nbytes for one in tensors_in(targets)) / IMAGES
        self.task_bytes = sum(one.nbytes for one in vars(self.task).values() if isinstance(one, Tensor))
        if targets is not None:
            if self.task.teacher is not None and not isinstance(outputs, Tensor):
                outputs = outputs[0]
            return self.task.loss(outputs, targets) * torch.ones(())
        return torch.stack([one.float().sum() for one in tensors_in(outputs) if one.requires_grad]).sum()

    def _summed(self, found: Recording) -> Profile:
        """What the recording says of any number of images."""
        index = {place: number for number, place in enumerate(sorted({one.place for one in found.stretches}))}
        passes = list(spans(found, index))
        used: dict[int, list[StateTensor]] = {}
        for name, tensor in self.tensors.items():
            block = next((n for n, block in enumerate(self.blocks) if name.startswith(f"{block.path}.")), None)
            place = 2 * block + 1 if block is not None else found.used.get(name, 0)
            used.setdefault(index.get(place, 0), []).append(tensor)
        nothing = NOTHING, NOTHING
        work: dict[tuple[str, int], tuple[Amount, Amount]] = {}
        for one in found.stretches:
            usual, again = (one.flops, one.moved), (one.again_flops, one.again_moved)
            for kind, (flops, moved) in (("backward" if one.backward else "forward", usual), ("recompute", again)):
                before = work.get((kind, one.place), nothing)
                work[kind, one.place] = before[0] + flops, before[1] + moved
        operations = found.operations()
        copied: dict[tuple[bool, int], Amount] = {}
        for one in found.stretches:
            copied[one.backward, one.place] = copied.get((one.backward, one.place), NOTHING) + one.offloaded
        parts = []
        for place, number in index.items():
            block = self.blocks[place // 2] if place % 2 else None
            ahead, back, again = (work.get((kind, place), nothing) for kind in ("forward", "backward", "recompute"))
            mine = [span for span in passes if span.part == number and not span.backward]
            saved = Amount(
                sum(span.end.fixed - span.begin.fixed for span in mine),
                sum(span.end.per_image - span.begin.per_image for span in mine),
            )
            enters, leaves = (found.boundaries.get((place // 2, out), 0.0) if block else 0.0 for out in (False, True))
            path, kind = (block.path, self.kinds[block.module]) if block else ("", -1 - number)
            as_run = fused if block and self.compiled else list
            forward, backward = (per_image(as_run(operations.get((back, place), []))) for back in (False, True))
            parts.append(
                Part(
                    path, kind, tuple(used.get(number, ())),
                    ahead[0].per_image, back[0].per_image, again[0].per_image, ahead[1], back[1], again[1], saved,
                    enters, leaves, forward, backward, copied.get((False, place), NOTHING), copied.get((True, place), NOTHING),
                )
            )  # fmt: skip
        return Profile(
            tuple(parts), tuple(passes), self.groups, self.shape, self.computing.dtype, self.device, self.casts, self.compiled,
            self.target_bytes, self.update, self.computing.autocast, self.task_bytes, self.task.weighed, self.unused,
        )  # fmt: skip


@contextmanager
def collector_paused() -> Iterator[None]:
    """Garbage in cycles stays until the end. Traces are kept, and to look through them takes a tenth of the time of a plan."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _for_an_image(value: Any) -> float:
    """Bytes of what belongs to one image in *value*."""
    return sum(Amount.of(leaf.nbytes).per_image for leaf in tensors_in(value))


def _within(mode: FusedAttention, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    counter = getattr(mode, "counter", None)
    if not isinstance(counter, Recorder):  # the products of a block are listed before anything is recorded
        return forward(*args, **kwargs)
    with mode, counter.recomputing():
        return forward(*args, **kwargs)


def _largest(shape: tuple[int, int, int], config: Config) -> tuple[int, int, int]:
    """The shape of the largest images that are trained on."""
    trained = [pair(stage.image_size) for stage in config.data.resize_schedule]
    height, width = max([shape[1:], *trained], key=lambda size: size[0] * size[1])
    return shape[0], height, width


def example_targets(task: Task, outputs: Tensor, samples: int, mixed: bool = False) -> Any:
    """Targets of *samples* images as the data of *task* gives them, without values; None where only the data knows."""
    classes = outputs.shape[1] if outputs.ndim > 1 else 1
    if type(task).__module__.partition(".")[0] != "bigvision":
        return None
    facts = {"class_weights": [1.0] * classes}
    if isinstance(task, Classify) and task.class_weights is not None:
        task.class_weights = "balanced"
    task.prepare([str(number) for number in range(classes)], facts)
    if task.target == "label":
        targets: Any = torch.empty(samples, dtype=torch.int64)
    elif task.target == "labels":
        targets = torch.empty(samples, classes, dtype=torch.uint8)
    elif task.target == "numbers":
        targets = torch.empty(samples, classes, dtype=torch.float64)
    elif task.target == "mask":
        targets = torch.empty(samples, *outputs.shape[-2:], dtype=torch.uint8)
    else:
        return None
    return task.mixed(targets, lambda values: values.clone(), torch.empty(samples)) if mixed else targets
