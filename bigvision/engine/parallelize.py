"""How a model is spread over the ranks: recomputed, compiled, then sharded, replicated or cut."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import logging
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from bigvision.config import SPLIT_BACKWARD, Config, other_sizes, parse_size
from bigvision.engine.state import Located, Statistics, local_tensor
from bigvision.errors import UserError
from bigvision.models import Block, Blueprint, SkippedBranches, formats, kinds, share_rates
from bigvision.models.alike import tensors_in
from bigvision.models.float8 import Float8, choose_float8, use_float8
from bigvision.models.offload import Hooks, Offload
from bigvision.models.recompute import recompute_blocks
from bigvision.models.tracing import size
from bigvision.runtime import Runtime

GRAPHS_PER_KIND = 8
"""Graphs that blocks of one kind may need. Four are expected: training and evaluation, each with the whole micro-batch and the
short last one."""
SYNCHRONIZED = ("cuda",)  # the kinds of devices that torch's SyncBatchNorm knows
UNIT_OF_CPU = 8 << 20
"""Bytes of fp32 weights that `parallel.unit_size: auto` gathers together on CPUs, but not in pipelines, whose passes alternate.
An exchange over gloo takes milliseconds however little it moves, on cores that compute meanwhile; NCCL's takes microseconds."""


@dataclass
class Spread:
    """A model spread over the ranks, as the native step needs it."""

    module: nn.Module  # the whole model; on meta, but for what this rank holds
    parts: list[nn.Module]  # what this rank runs of it: the module itself, or pipeline stages
    tensors: Callable[[], Mapping[str, Tensor]]  # what is saved of the whole model, by name; on meta where not held here
    locate: Callable[[Tensor], Located]  # where this rank's values of a parameter or buffer lie in the whole tensor
    equal_gradients: Callable[[Tensor], int]  # number of ranks that hold the same values of a gradient
    forward: Callable[[Tensor], Any]  # what is called in a step: the module, or what is wrapped around it
    unreduced: list[str] = field(default_factory=list)  # parameters whose gradients the backward pass does not average
    around: Callable[[bool], AbstractContextManager[object]] = lambda last: nullcontext()
    """Surrounds each micro-batch; given whether it is the step's last."""

    def held(self) -> dict[str, nn.Parameter]:
        """The parameters of which this rank holds at least a shard, each tied one once, by the whole model's names."""
        # A stage may meet a tied one under another name first.
        here = {name: tensor for part in self.parts for name, tensor in part.named_parameters(remove_duplicate=False)}
        return {name: here[name] for name, _ in self.module.named_parameters() if name in here}


# The number format.


@dataclass(frozen=True)
class Computing:
    """In which format and layout a model computes."""

    dtype: torch.dtype
    autocast: bool = False
    residual: bool = True  # whether blocks get their input in fp32
    channels_last: bool = False
    note: str | None = None
    float8: Float8 | None = None  # the layers that compute in fp8, where any do

    def apply(self, parts: Sequence[nn.Module], blocks: Sequence[nn.Module], cast_weights: bool, device: torch.device) -> None:
        """Make *parts* compute so, in place."""
        if self.float8 is not None:
            for part in parts:
                use_float8(part, self.float8.names)
        if self.dtype == torch.float32 or self.autocast:
            formats.compute_in(parts, (), None, self.channels_last, norms=self.autocast)
            for part in parts if self.autocast else ():
                formats.autocast_inside(part, self.dtype, device)
        else:
            formats.compute_in(parts, blocks if self.residual else (), self.dtype, self.channels_last, cast_weights)


def choose_computing(
    config: Config, blueprint: Blueprint, blocks: Sequence[Block], device: torch.device, given_layout: bool, images: int
) -> Computing:
    """Decide how the model of *blueprint*, on meta, computes; *given_layout*: the caller's own came in channels_last.

    *images* are those of a micro-batch, on which it depends what fp8 pays for.
    """
    asked, dtype = config.parallel.channels_last, formats.COMPUTE_DTYPES[config.parallel.precision]
    measured = device.type == "cuda" or config.parallel.precision == "fp32"
    liked = given_layout or (measured and formats.likes_channels_last(blueprint.module, device.type))
    choice = Computing(dtype, channels_last=asked == "always" or (asked == "auto" and liked))
    if config.parallel.precision in ("fp32", "amp_bf16"):
        return replace(choice, autocast=config.parallel.precision == "amp_bf16")
    if config.parallel.precision == "fp8":
        asked = config.parallel.fp8_layers
        choice = replace(choice, float8=choose_float8(blueprint.module, blocks, blueprint.input_shape, images, asked))
    modules = [block.module for block in blocks]
    if formats.why_not(blueprint.module, modules, blueprint.input_shape, dtype) is None:
        return choice
    if (reason := formats.why_not(blueprint.module, modules, blueprint.input_shape, dtype, residual=False)) is None:
        return replace(choice, residual=False)
    note = f"{config.model.name} computes under autocast: its own forward mixes number formats ({reason})"
    return replace(choice, autocast=True, note=note)


# BatchNorm over several ranks.


def synchronize_norms(module: nn.Module, runtime: Runtime) -> list[str]:
    """Let BatchNorm in *module* take its statistics over the data-parallel ranks (of a pipeline: of a stage), in place.

    This is timm's ``convert_sync_batchnorm``, but a module stays the same object and changes its class, so that blocks and
    stages that were found before still hold it. Do it after `choose_computing`: torch's SyncBatchNorm refuses meta. Returns
    what the user should know. Raises `UserError` for a kind of BatchNorm with a forward of its own.
    """
    norms = {path: part for path, part in module.named_modules() if isinstance(part, BatchNorm)}
    if not norms:
        return ["model.sync_batchnorm: true changes nothing: the model has no BatchNorm"]
    if runtime.data_ranks == 1 or runtime.device.type not in SYNCHRONIZED:  # an evaluation elsewhere exchanges nothing
        return []
    for path, part in norms.items():
        if isinstance(part, nn.SyncBatchNorm):
            continue
        forward = type(part).forward
        if forward not in (BatchNorm.forward, BatchNormAct2d.forward):
            kind = f"{path} is a {type(part).__name__} with a forward of its own"
            raise UserError(f"model.sync_batchnorm: true, but {kind}, which has no synchronized form: use false")
        part.__class__ = nn.SyncBatchNorm if forward is BatchNorm.forward else SyncBatchNormAct  # type: ignore[assignment]
        part.process_group = runtime.data_group  # type: ignore[assignment]
    return []


# Recompute and compile.


def wrap_blocks(
    blocks: Sequence[nn.Module], config: Config, device: torch.device, model: nn.Module, image_shape: tuple[int, int, int],
    branches: SkippedBranches | None = None, offload: Offload | None = None, gathered: torch.dtype = torch.float32,
) -> list[str]:  # fmt: skip
    """Recompute, compile and *offload* each block of *model*, on meta, where *config* says so, in this order and in place;
    return what the user should know. *image_shape*: channels, height and width.

    A block that is recomputed draws no other samples for its *branches*. *gathered*: in which type weights are when they are
    read, where the modules do not cast them (see :func:`shard`).

    Only the blocks' ``forward`` is replaced: names do not change, and hooks that gather and free parameters stay outside of
    what is compiled. Raises `UserError` where both are asked for blocks with BatchNorm.
    """
    eager = why_eager(config, blocks, device)
    recompute = config.parallel.recompute
    normed = any(isinstance(module, BatchNorm) for block in blocks for module in block.modules())
    if recompute != "none" and eager is None and normed:
        raise UserError(
            f"parallel.recompute: {recompute} and parallel.compile: true exclude each other for BatchNorm: drop one"
        )
    # In compiled code both passes read the same tensors.
    offloaded = offload is not None and eager is not None
    with _held_as(model, gathered):
        recompute_blocks(blocks, recompute, model, image_shape, branches if eager is not None else None, offloaded)
    if eager is None:
        # Under a budget, blocks of one kind may keep one of two choices of products.
        variants = 2 if recompute.startswith("budget") else 1
        compile_blocks(blocks, device, variants * (1 + len(set(other_sizes(config.data).values()))))
        for block in blocks:
            if branches is not None and block in branches.parts:
                block.forward = functools.partial(_with_any_number, block.forward, branches)
    if offload is not None:
        for block in blocks:
            offload.wrap(block)
    return [f"parallel.compile: auto compiles nothing: {eager}"] if eager and config.parallel.compile == "auto" else []


def make_offload(config: Config, device: torch.device, around: Hooks | None = None) -> Offload | None:
    """What moves activations off *device*, where *config* says so. *around*: the strategy's hooks of autograd."""
    return Offload(device, around) if config.parallel.offloads_activations else None


@contextmanager
def _held_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let the weights of *model*, on meta, be as ``fully_shard`` gathers them in *dtype*."""
    fp32 = {p: p.data for p in model.parameters() if p.is_meta and p.dtype == torch.float32 != dtype}
    for parameter in fp32.keys() - _kept_whole(model.modules(), fp32):
        parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in fp32.items():
            parameter.data = data


def _with_any_number(forward: Callable[..., Any], branches: SkippedBranches, *args: Any, **kwargs: Any) -> Any:
    """Call *forward*, compiled, of a part of *branches*: one graph serves all numbers of kept samples."""
    tensors = tensors_in((args, kwargs)) if branches.drawn is not None else []
    for tensor in tensors:
        if tensor.ndim and tensor.shape[0] == tensors[0].shape[0]:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return forward(*args, **kwargs)


def why_eager(
    config: Config, blocks: Sequence[nn.Module], device: torch.device,
    missing: Callable[[torch.device], str | None] | None = lambda device: lacks_for_compile(device),
) -> str | None:  # fmt: skip
    """Why *blocks* are not compiled; None where they are. Nothing is measured, so the answer is the same at each restart.

    *missing* is what this machine lacks for it; None where another machine's is asked for.
    """
    if isinstance(config.parallel.compile, bool):
        return None if config.parallel.compile else "parallel.compile: false"
    parallel, count = config.parallel, len(kinds(blocks))
    if device.type != "cuda":
        return "the device is not CUDA"
    if parallel.schedule in SPLIT_BACKWARD:
        return f"parallel.schedule: {parallel.schedule} takes backward passes apart"
    if parallel.strategy == "zero3":
        return "the hooks of zero3 would cut each block into many small graphs"
    if parallel.recompute != "none" and any(isinstance(m, BatchNorm) for block in blocks for m in block.modules()):
        return f"parallel.recompute: {parallel.recompute} excludes it for models with BatchNorm"
    if any(isinstance(m, nn.SyncBatchNorm) for block in blocks for m in block.modules()):
        return "SyncBatchNorm exchanges statistics within the blocks"
    if len(blocks) < 2 * count:
        return f"{len(blocks)} blocks of {count} kinds do not repeat enough to be worth {count} graphs"
    lacks = missing and missing(device)
    return lacks and f"it needs {lacks}"


def lacks_for_compile(device: torch.device) -> str | None:
    """What inductor lacks on this machine to compile for *device*."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "Triton (the Python package triton)"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "a GPU of compute capability 7.0 or newer"
        compilers, what = (os.environ.get("CC"), "gcc", "clang"), "a C compiler (gcc), which Triton calls"
    else:
        default = "clang++" if sys.platform == "darwin" else "g++"
        compilers, what = (os.environ.get("CXX", default),), "a C++ compiler (g++)"
    if not any(name and shutil.which(name) for name in compilers):
        return what
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's header Python.h (the system package python3-dev)"
    return None


def compile_blocks(blocks: Sequence[nn.Module], device: torch.device, variants: int = 1) -> None:
    """Replace the ``forward`` of each block by a compiled one, in place. Blocks of one kind share their graphs.

    A block that would need more than `GRAPHS_PER_KIND` for each of its *variants*, such as the sizes of images that it gets, is
    reported on stderr and runs eagerly where none of its graphs fits.
    """
    groups = kinds(blocks)
    for group in groups:
        share_rates(group, device)
    _keep_cache()
    dynamo: Any = torch._dynamo.config
    # Counted per code object: stages of different widths share the block's, and under recompute all share checkpoint's.
    dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS_PER_KIND * len(groups) * variants)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, dynamo.recompile_limit)
    # It would split blocks that are larger than DDP's buckets; these are exchanged between the blocks' backward passes anyway.
    dynamo.optimize_ddp = False
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_report_limit)
    for block in blocks:
        # Not dynamic: one slow kernel would serve blocks of all widths.
        block.forward = torch.compile(block.forward, dynamic=False)


def _report_limit(record: logging.LogRecord) -> bool:
    """A filter of dynamo's log: the paragraph on a limit that was hit becomes one line."""
    if not str(record.msg).startswith("torch._dynamo hit config.") or not isinstance(record.args, tuple):
        return True
    _, limit, function, reason, *_ = record.args
    reason = " ".join(str(reason).split("#")[0].split()).partition(": ")[2]
    print(
        f"warning: parallel.compile: {function} has {limit} graphs and runs eagerly where none of them fits (the last differs "
        f"in {reason}): remove what differs, or use parallel.compile: false",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    return False


def _keep_cache() -> None:
    """Keep compiled code in the user's cache folder: torch's default, in /tmp, is often lost with a cluster's job.

    Ranks and runs share it. torch's names of entries lack the processor, for which CPU code is compiled (-march=native), so
    each kind of processor gets a folder of its own.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch sets the variable to its default while it is imported.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", "") not in ("", default_cache_dir()):
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        info = Path("/proc/cpuinfo")
        flags = re.search(r"^(flags|Features)\s*:.*", info.read_text() if info.exists() else "", re.M)
        processor = hashlib.sha256((flags[0] if flags else platform.processor()).encode()).hexdigest()[:8]
        folder = base / "bigvision" / "compile" / f"{platform.machine()}-{processor}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that is read-only, or none
        return
    if os.access(folder, os.W_OK):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


# One function per strategy.


def replicate(module: nn.Module, parts: list[nn.Module], runtime: Runtime) -> Spread:
    """A copy of *parts* on every data-parallel rank; gradients are averaged after the backward passes, or by `overlap`."""
    copies = (runtime.data_rank, runtime.data_ranks)
    spread = Spread(
        module, parts, lambda: module.state_dict(keep_vars=True), lambda tensor: (tensor.view(-1), 0, copies),
        lambda gradient: runtime.data_ranks, module,
    )  # fmt: skip
    spread.unreduced = list(spread.held()) if runtime.data_ranks > 1 else []
    return spread


def overlap(spread: Spread, example: Tensor, statistics: Statistics, reduce: str) -> None:
    """Average gradients while the last backward pass runs (DistributedDataParallel, Li et al. 2020); *statistics* are kept.

    *reduce*: ``parallel.reduce``.
    """
    module = spread.module

    def rehearse(model: Callable[[Tensor], Any]) -> None:
        """A forward and backward pass in training mode, in which branches may run that evaluation does not have."""
        statistics.keep()
        # Not compiled: a batch of another size would be a graph of its own. By default torch would keep the random state of all
        # devices, with a warning.
        with torch.random.fork_rng([example.device] if example.is_cuda else []), torch.compiler.set_stance("force_eager"):
            outputs = [leaf for leaf in tree_leaves(model(example)) if isinstance(leaf, Tensor) and leaf.requires_grad]
            torch.stack([output.float().sum() for output in outputs]).sum().backward()
        statistics.restore(torch.ones((), dtype=torch.bool, device=example.device))

    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    # Gradients of expanded tokens: a copy of a few values.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    rehearse(module)
    unused = any(p.grad is None for p in module.parameters() if p.requires_grad)
    module.zero_grad(set_to_none=True)
    wrapped = DistributedDataParallel(
        module, broadcast_buffers=False, init_sync=False, find_unused_parameters=unused, gradient_as_bucket_view=True
    )
    if reduce == "bf16":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    # After its first backward pass DDP rebuilds its buckets, once, in the order in which gradients came. Without
    # this one a resumed run would sum its first step in another order than the run that it continues.
    rehearse(wrapped)
    module.zero_grad(set_to_none=True)
    spread.forward, spread.unreduced = wrapped, []
    spread.around = lambda last: nullcontext() if last else wrapped.no_sync()


def shard(
    module: nn.Module, parts: list[nn.Module], blocks: Sequence[nn.Module], config: Config, dtype: torch.dtype, runtime: Runtime
) -> Spread:  # fmt: skip
    """FSDP2: ``fully_shard`` on each unit of blocks and on each part (Zhao et al. 2023), over a (replicate, shard) mesh.

    Scalars, which cannot be sharded, and BatchNorm's weights, which must stay fp32 beside fp32 running statistics, are
    kept whole on every rank; they are few and small. One rank alone shards nothing: see :func:`replicate`.
    """
    spread = replicate(module, parts, runtime)
    parallel = config.parallel
    whole = _kept_whole((module for part in parts for module in part.modules()), spread.held().values())
    names = [name for name, parameter in spread.held().items() if parameter in whole]
    mesh = runtime.mesh["replicate", "shard"] if parallel.replicas > 1 else runtime.mesh["shard"]
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=formats.COMPUTE_DTYPES[parallel.reduce],
        cast_forward_inputs=False,
    )  # fmt: skip
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": whole}
    if parallel.reshard == "never":
        options["reshard_after_forward"] = False
    roots: list[Any] = []
    for part in parts:
        inside = set(part.modules())
        units: list[Any] = []
        mine = [block for block in blocks if block in inside]
        for places in units_of([size(block) for block in mine], config, runtime.device.type):
            unit = [mine[place] for place in places]
            for block in unit:
                block.register_forward_hook(_copied_if_view)
            fully_shard(unit, **options)
            units.append(unit[0])  # all blocks of a unit share FSDP's state
        roots.append(fully_shard(part, **options))
        if runtime.pipeline_ranks == 1:
            # Explicit, since the implicit order is known after the first pass only; in a pipeline passes alternate.
            for before, after in itertools.pairwise(units):
                before.set_modules_to_forward_prefetch([after])
                after.set_modules_to_backward_prefetch([before])

    def around(last: bool) -> AbstractContextManager[object]:
        # Gradients are scattered after every micro-batch, so that none is ever kept whole, unless that is asked for; the
        # exchange between replicas waits for the last in any case.
        for root in roots:
            assert isinstance(root, FSDPModule)
            root.set_requires_all_reduce(last)
            if parallel.scatter == "last":
                root.set_requires_gradient_sync(last)
        return nullcontext()

    def locate(tensor: Tensor) -> Located:
        if not isinstance(tensor, DTensor):
            return tensor.view(-1), 0, (runtime.data_rank, runtime.data_ranks)
        values = local_tensor(tensor)
        # fully_shard cuts dimension 0 as torch.chunk does: all but the last shards that are not empty are equal.
        rows, (shard, shards) = tensor.shape[0], runtime.shard
        chunk = -(-rows // shards)
        start_row = min(rows, chunk * shard)
        if values.shape[0] != min(chunk, rows - start_row):
            raise RuntimeError(f"rank {runtime.rank} holds {tuple(values.shape)} of a tensor {tuple(tensor.shape)}")
        return values.view(-1), start_row * (tensor.numel() // rows if rows else 0), runtime.replica

    spread.locate, spread.around = locate, around
    spread.equal_gradients = lambda gradient: parallel.replicas if isinstance(gradient, DTensor) else runtime.data_ranks
    spread.unreduced = names
    return spread


def _kept_whole(modules: Iterable[nn.Module], parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    """Those of *parameters* that are not sharded."""
    norms = [module for module in modules if isinstance(module, BatchNorm)]
    whole = {parameter for norm in norms for parameter in norm.parameters(recurse=False)}
    return whole | {parameter for parameter in parameters if parameter.ndim == 0}


def units_of(sizes: Sequence[int], config: Config, device: str) -> list[range]:
    """Blocks with so many parameters as ``parallel.unit_size`` has them gathered: consecutive ones, by their places.

    Those of a unit are together at most so many bytes of fp32 weights. *device* is a type: cpu or cuda.
    """
    asked = config.parallel.unit_size
    if asked not in ("auto", "block"):
        limit = parse_size(asked, "parallel.unit_size")
    else:
        limit = UNIT_OF_CPU if asked == "auto" and device == "cpu" and config.parallel.strategy == "fsdp" else 0
    units: list[range] = []
    total = 0
    for place, numel in enumerate(sizes):
        if not units or (total := total + 4 * numel) > limit:
            units.append(range(place, place))
            total = 4 * numel
        units[-1] = range(units[-1].start, place + 1)
    return units


def _copied_if_view(block: nn.Module, inputs: object, output: object) -> object:
    """Copy an output that is a view: an in-place operation on it would drop the hook that gathers the block's parameters."""
    if isinstance(output, Tensor) and output._is_view():
        return output.clone()
    if isinstance(output, (tuple, list)):
        return type(output)(_copied_if_view(block, inputs, part) for part in output)
    return output
