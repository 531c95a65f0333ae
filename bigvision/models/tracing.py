"""A coarse torch.fx trace of a timm model, and what its nodes cost, counted on the meta device."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.immutable_collections import immutable_list
from torch.fx.proxy import ParameterProxy
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    conv_flop_count,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from bigvision.models.alike import EqualCalls, Result, tensors_in

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_mm")
"""Operations whose weight, or second factor, tells one from another."""
Key = tuple[str, tuple[int, ...]]
"""A product: the operation, and the shape of its weight. It is the same for every micro-batch."""

SAMPLES = 2  # images with which a graph is run; BatchNorm refuses single values
FLOPS_PER_BYTE = {"cpu": 8.0, "cuda": 100.0}  # FLOPs in the time that one byte of an operation's tensors takes to move


def first_line(error: Exception) -> str:
    """The first line of what *error* says; the name of its type where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, persistent or not, under every name that it has."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of *module* that torch does not keep in registers of its own."""
    return {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}


class TraceFailed(Exception):
    """The model, or too large a part of it to be one piece, cannot be traced; the message says why."""


class _BufferProxy(fx.Proxy):
    """Stands for a buffer; its shape is known, so that Python may decide by it."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, buffer: Tensor) -> None:
        super().__init__(node, tracer)
        self._buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name) if name in ("shape", "ndim", "size", "dim", "numel") else super().__getattr__(name)


class CoarseTracer(fx.Tracer):
    """Calls the modules in `opened` and keeps every other one as a single node."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()), param_shapes_constant=True)
        self._opened = opened
        self.inside: list[str] = []  # paths of the modules being called; after a failure, the last is where it happened
        self._names: dict[int, str] = {}  # of the root's parameters and buffers; fx would look through all of them each time

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The images alone: what else a forward takes is left at its default, by which Python may decide."""
        name = next(iter(list(inspect.signature(root_fn).parameters)[1:]), "images")
        return root_fn, [self.root, self.create_proxy("placeholder", name, (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._opened

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        self.inside.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        named = (*root.named_buffers(), *root.named_parameters())
        self._names = {id(tensor): name for name, tensor in named}
        return super().trace(root, concrete_args)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """What is computed from buffers is part of the graph too; without this it would be a constant, here on meta."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            node = self.create_node("get_attr", name, (), {})
            proxy: fx.Proxy = _BufferProxy(self, node, attr_val)
            if isinstance(attr_val, nn.Parameter):
                proxy = ParameterProxy(self, node, name, attr_val)
            parameter_proxy_cache[name] = proxy
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """Refuse a tensor of no name (in a list or dict, or made by forward): whoever runs the graph could not find it."""
        if isinstance(a, Tensor) and id(a) not in self._names and not any(a is one for one in self.tensor_attrs):
            raise TraceFailed("it computes with a tensor that has no name: register it as a buffer")
        return super().create_arg(a)


def trace(module: nn.Module, max_share: float = 0.25, inside: Iterable[str] = ()) -> fx.GraphModule:
    """Trace `module` in its present mode (training or evaluation), computing nothing and leaving it as it is.

    The graph's ``call_module`` nodes are `module`'s own submodules, none of them larger than `max_share` of its
    parameters as far as they can be opened. Those at the paths *inside* are looked into too. Raises `TraceFailed`.
    """
    opened = openable(module, max_share) | set(inside)
    while True:
        tracer = CoarseTracer(opened)
        try:
            with attributes_kept(module):
                graph = tracer.trace(module)
        except Exception as error:
            path = tracer.inside[-1] if tracer.inside else ""
            if size(module.get_submodule(path)) > max_share * size(module):
                # A small model inside of a larger one may return a list, which a node's value cannot stand for.
                if not (inner := set(_stages(module))) <= opened:
                    opened = opened | inner
                    continue
                where = f"{path or 'forward'} of {type(module).__name__}"
                raise TraceFailed(f"{where} cannot be traced: {first_line(error).split('. ')[0]}") from error
            opened = opened - {path}  # small enough to stay in one piece
            continue
        return fx.GraphModule(module, graph, type(module).__name__)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Undo what forwards keep in plain attributes: in a trace it would be what stands for values."""
    before = [(part, plain_attributes(part)) for part in module.modules()]
    for _, attributes in before:
        attributes.update({key: copy.copy(value) for key, value in attributes.items() if type(value) in (dict, list)})
    try:
        yield
    finally:
        for part, attributes in before:
            for key in plain_attributes(part).keys() - attributes.keys():
                del vars(part)[key]
            vars(part).update(attributes)


def openable(module: nn.Module, max_share: float) -> set[str]:
    """The paths of the modules to look into: containers, stages, too large a share, what shares parameters with the rest."""
    total = size(module)
    closed = tuple(get_notrace_modules())
    owners = holders(module)
    opened: set[str] = set()

    def visit(path: str, child: nn.Module, parent: nn.Module) -> None:
        if path:
            if isinstance(child, closed) or not has_parts(child):
                return
            small = size(child) <= max_share * total and shares_nothing(child, owners)
            if small and (is_unit(child, parent) or not (isinstance(child, CONTAINERS) or is_stage(child))):
                return
        opened.add(path)
        for name, grandchild in child._modules.items():
            if grandchild is not None:
                visit(f"{path}.{name}" if path else name, grandchild, child)

    visit("", module, module)
    return opened


def _stages(module: nn.Module) -> Iterator[str]:
    """The paths of all stages, and of the modules that they are in."""
    for path, part in module.named_modules():
        if path and is_stage(part):
            parts = path.split(".")
            yield from (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


def holders(module: nn.Module) -> Counter[int]:
    """How many places in `module` hold each parameter, by id; more than one where it is tied or its module is shared."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def shares_nothing(part: nn.Module, owners: Counter[int]) -> bool:
    """Whether all holders of the parameters of `part` are inside it."""
    return all(owners[parameter] == count for parameter, count in holders(part).items())


def model_name(model: nn.Module) -> str:
    """timm's name of *model*, or its class's."""
    return getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__


def size(module: nn.Module) -> int:
    """Parameters, each tied one once."""
    return sum(parameter.numel() for parameter in module.parameters())


def has_parts(module: nn.Module) -> bool:
    """Whether `module` can be looked into: it has submodules, and is no primitive of torch's."""
    # A linear layer with an adapter is as whole as one without.
    torchs = type(module).__module__.startswith("torch.nn.") and not isinstance(module, CONTAINERS)
    primitive = torchs or isinstance(module, nn.Linear)
    return not primitive and bool(module._modules)


def is_piece(module: nn.Module) -> bool:
    """Whether `module` multiplies by at least two weights, as a block of any kind does and a lone layer does not."""
    adapters = {child for m in module.modules() if isinstance(m, nn.Linear) for child in m.children()}
    layers = [m for m in module.modules() if m not in adapters]
    weights = {id(p) for m in layers for p in m._parameters.values() if p is not None and p.dim() > 1}
    return len(weights) > 1


def is_unit(module: nn.Module, parent: nn.Module) -> bool:
    """Whether `module` is a Sequential of lone layers, repeated in a container: a block without a class of its own."""
    return isinstance(module, nn.Sequential) and isinstance(parent, CONTAINERS) and is_piece(module) and not _pieces(module)


def is_stage(module: nn.Module) -> bool:
    """Whether most of `module` is one container of blocks, or all of it is blocks of one class, more than two."""
    if any(isinstance(c, CONTAINERS) and _pieces(c) and 2 * size(c) >= size(module) for c in module.children()):
        return True
    parts = [child for child in module.children() if size(child)]
    return len(parts) > 2 and len({type(part) for part in parts}) == 1 and len(_pieces(module)) == len(parts)


def _pieces(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if is_piece(child)]


def tensors_of(node: fx.Node, module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of *module* that *node*, of a trace of it, uses."""
    if node.op == "get_attr":
        found = functools.reduce(lambda part, name: getattr(part, name, None), str(node.target).split("."), module)
        return [found] if isinstance(found, Tensor) else []  # a constant that the trace made is none of the module's
    if node.op == "call_module":
        part = module.get_submodule(str(node.target))
        return [*part.parameters(), *part.buffers()]
    return []


class Runner(fx.Interpreter):
    """Runs a graph; modules get lists and dicts of their own, which they may change."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().run(*args, **kwargs)
        finally:
            self.env = {}  # else the last output would keep its activations until the next run

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(target, _plain(args), _plain(kwargs))


def _plain(value: Any) -> Any:
    """*value* with torch.fx's immutable lists and dicts as plain ones."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, immutable_list):
        return [_plain(item) for item in value]
    return tuple(map(_plain, value)) if type(value) is tuple else value


@dataclass(frozen=True)
class Cost:
    """Of one node or of several together; all but the numbers of parameters are for one image."""

    flops: float = 0.0  # of the forward pass; a multiplication with an addition counts as two
    work: float = 0.0  # FLOPs; for operations that move more than they compute, the FLOPs that would fit into that time
    activations: float = 0.0  # bytes that the forward pass keeps for the backward pass
    recomputed: float = 0.0  # bytes that the backward pass makes again for a recomputed block; of several the most
    parameters: int = 0
    trained: int = 0  # how many of the parameters are trained
    received: float = 0.0  # bytes that arrive from the stage before
    sent: float = 0.0  # bytes that leave for the next stage

    def __add__(self, other: Cost) -> Cost:
        sums: dict[str, Any] = {one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)}
        sums["recomputed"] = max(self.recomputed, other.recomputed)
        return Cost(**sums)


def _count_attention_of_cpus() -> None:
    """Let torch's counter know the attention that compiled blocks call on fake tensors of a CPU; it has those of CUDA alone."""
    aten: Any = torch.ops.aten
    forward, backward = (getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{end}") for end in ("", "_backward"))
    if forward not in flop_registry:
        register_flop_formula(forward)(lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value))
    if backward not in flop_registry:
        register_flop_formula(backward)(
            lambda gradient, query, key, value, *_, **__: sdpa_backward_flop_count(gradient, query, key, value)
        )


_count_attention_of_cpus()


class OpCounter(TorchDispatchMode):
    """Adds up the operations performed on tensors without values (the roofline of Williams et al. 2009, each by itself)."""

    def __init__(self, flops_per_byte: float = 0.0) -> None:
        super().__init__()
        self.flops_per_byte = flops_per_byte
        self.flops = self.work = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is FUSED_ATTENTION.default:
            moved = [one.nbytes for one in (*args, result[0]) if one is not None]
            self.attention(attention_flops(*args[:3]), moved, args[:3], result[:1])
            return result
        formula = flop_registry.get(func._overloadpacket)
        flops = 0.0
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            # torch's formula counts the gradient of a grouped convolution's weight as if it were not grouped.
            gradient, images, weight, *_, transposed, _, _, asked = args
            forward = conv_flop_count(images.shape, weight.shape, gradient.shape, transposed)
            flops = float(forward * (asked[0] + asked[1]))
        elif formula is not None:
            flops = float(formula(*args, **(kwargs or {}), out_val=result))
        moved: list[float] = []
        if formula is not None or not func.is_view:
            moved = [leaf.nbytes for leaf in tensors_in((args, kwargs, result))]
        self.add(flops, moved)
        return result

    def add(self, flops: float, moved: Sequence[float]) -> None:
        """Count an operation that moves so many bytes of each of its tensors."""
        self.flops += flops
        self.work += max(flops, sum(moved) * self.flops_per_byte)

    def attention(self, flops: float, moved: Sequence[float], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Count one pass of a fused kernel."""
        self.add(flops, moved)


IN_FP32 = {
    nn.functional.layer_norm, nn.functional.group_norm, nn.functional.softmax, torch.softmax, Tensor.softmax,
    nn.functional.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.exp, Tensor.exp, torch.pow, Tensor.pow,
    torch.sum, Tensor.sum, nn.functional.normalize,
}  # fmt: skip
"""Functions that CUDA's autocast computes in fp32, and the CPU's does not."""


class FusedAttention(TorchFunctionMode):
    """Lets attention keep and compute what the fused kernels of *device* do, which keep no matrix of probabilities.

    On meta it would keep that; on fake tensors of the CPU torch chooses what the CPU's kernel takes.
    """

    counter: OpCounter

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in IN_FP32 and self.device == "cuda" and torch.is_autocast_enabled("cpu"):
            args = tuple(one.float() if isinstance(one, Tensor) and one.is_floating_point() else one for one in args)
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask", "dropout_p"), args)) | kwargs
        query, key, value, mask = (named.get(name) for name in ("query", "key", "value", "attn_mask"))
        if self.device == "cpu" and (named.get("dropout_p") or (mask is not None and mask.requires_grad)):
            return func(*args, **kwargs)  # the CPU's kernel has neither
        if query.ndim != 4:
            return func(*args, **kwargs)  # fused kernels take (images, heads, places, channels) alone
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (one.to(torch.get_autocast_dtype("cpu")) for one in (query, key, value))
        return _Attention.apply(self.counter, query, key, value, mask)


def attention_flops(query: Tensor, key: Tensor, value: Tensor) -> float:
    """Of a forward pass."""
    *batch, length, _ = query.shape
    return 2.0 * math.prod(batch) * length * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a fused kernel allocates: the output, and for the backward pass the sum of each row's exponentials."""
    *batch, length, _ = query.shape
    # As the kernels lay it out: the heads of a place lie together.
    shape = (*batch[:-1], length, *batch[-1:], value.shape[-1])
    output = query.new_empty(shape).transpose(-2, -3) if len(batch) > 1 else query.new_empty(*batch, length, value.shape[-1])
    return output, query.new_empty((*batch, length), dtype=torch.float32)


_LIBRARY = torch.library.Library("bigvision", "DEF")
_LIBRARY.define("attention(Tensor query, Tensor key, Tensor value, Tensor? mask) -> (Tensor, Tensor)")
_LIBRARY.impl("attention", _attention, "CompositeExplicitAutograd")
FUSED_ATTENTION = torch.ops.bigvision.attention
"""Fused attention without values: one operation, so that it can be counted, and kept by `engine.recompute`."""


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counter: OpCounter, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.counter, ctx.flops = counter, attention_flops(query, key, value)
        output, sums = FUSED_ATTENTION(query, key, value, mask)
        ctx.save_for_backward(query, key, value, mask, output.detach(), sums)
        ctx.moved = [one.nbytes for one in (query, key, value, output, mask) if one is not None]
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask, *_ = ctx.saved_tensors
        # The kernels compute the probabilities again: five products where the forward pass has two.
        wanted = zip((query, key, value, mask), ctx.needs_input_grad[1:])
        found = [torch.empty_like(one) if one is not None and needed else None for one, needed in wanted]
        outputs = [one for one in found if one is not None]
        moved = [2 * size for size in ctx.moved]
        ctx.counter.attention(2.5 * ctx.flops, moved, (query, key, value, *gradients), outputs)
        return None, *found


def product(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Key | None:
    """The key of a call of *func*; None where it is no product, or one that must be computed again.

    Attention with dropout is: if its kept result were used, the layers after it would draw other random numbers.
    """
    if not computes_products(func):
        return None
    name = func._schema.name.rpartition("::")[2]
    if name in PRODUCTS:
        weight = args[2] if name in ("addmm", "baddbmm") else args[1]
        return name, tuple(weight.shape[1:] if name in ("bmm", "baddbmm") else weight.shape)
    named = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    return None if named.get("dropout_p") else ("attention", ())


def computes_products(func: Any) -> bool:
    """Whether *func* is a matrix product, a convolution or attention."""
    name = func._schema.name.rpartition("::")[2]
    return name in PRODUCTS or func is FUSED_ATTENTION.default or ("scaled_dot_product" in name and "backward" not in name)


class _Keeping(OpCounter):
    """Remembers what the products *keys* compute."""

    def __init__(self, flops_per_byte: float, keys: Collection[Key]) -> None:
        super().__init__(flops_per_byte)
        self.keys, self.kept = keys, list[Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.keys and product(func, args, kwargs or {}) in self.keys:
            self.kept += tensors_in(result)
        return result


class _CostRunner(Runner):
    def __init__(
        self, graph: fx.GraphModule, device: str, compute: torch.dtype, recomputed: Mapping[str, Collection[Key]],
        calls: EqualCalls,
    ) -> None:  # fmt: skip
        super().__init__(graph)
        self.attention, self.flops_per_byte = FusedAttention(device), FLOPS_PER_BYTE[device]
        self.compute, self.recomputed = compute, recomputed
        self.costs: dict[str, Cost] = {}
        self.kept: dict[int, Tensor] = {}  # by storage: a tensor that two nodes need is kept once
        self.counted: set[nn.Parameter] = set()
        self.calls, self.numbers = calls, itertools.count(1)

    def run_node(self, n: fx.Node) -> Any:
        again = self.recomputed.get(str(n.target)) if n.op == "call_module" else None
        value, flops, work, saved, products = self._counted(n, frozenset(again or ()))
        recomputed = 0.0
        if again is not None:
            recomputed = sum(map(self._nbytes, saved.values())) - sum(map(self._nbytes, products.values()))
            inputs = tensors_in(self.fetch_args_kwargs_from_env(n))
            saved = products | {tensor.untyped_storage()._cdata: tensor for tensor in inputs}
        kept = sum(self._nbytes(tensor) for key, tensor in saved.items() if key not in self.kept)
        self.kept |= saved
        new = {tensor for tensor in tensors_of(n, self.module) if isinstance(tensor, nn.Parameter)} - self.counted
        self.counted |= new
        self.costs[n.name] = Cost(
            flops / SAMPLES, work / SAMPLES, kept / SAMPLES, recomputed / SAMPLES,
            sum(parameter.numel() for parameter in new), sum(parameter.numel() for parameter in new if parameter.requires_grad),
        )  # fmt: skip
        return value

    def _counted(self, n: fx.Node, products: Collection[Key]) -> tuple[Any, float, float, dict[int, Tensor], dict[int, Tensor]]:
        """The value of *n*, what it computes, what it keeps for the backward pass, and what its *products* are, by storage."""
        key, module, known = None, None, self.calls.results
        saved, made = dict[int, Tensor](), dict[int, Tensor]()
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        inputs = tensors_in((args, kwargs))
        if n.op == "call_module":
            module = self.fetch_attr(str(n.target))
            if (equal := self.calls.key(module, args, kwargs)) is not None:
                key = equal, products
        if module is not None and key in known:
            result, flops, work, *kept = known[key]
            value = result.made()
            # Some of what the other one kept was there before or is its result, and some it made itself.
            here = [*inputs, value, *module.buffers()]
            for found, tensors in zip((saved, made), kept):
                for place, tensor in tensors:
                    mine = tensor if place is None else here[place]
                    found[-next(self.numbers) if place is None else mine.untyped_storage()._cdata] = mine
            return value, flops, work, saved, made

        def pack(tensor: Tensor) -> Tensor:
            # An operation keeps this function and what it returns: if these held its own result, it would never be freed.
            kept = tensor.detach()
            if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):
                saved[tensor.untyped_storage()._cdata] = kept
            return kept

        self.attention.counter = counter = _Keeping(self.flops_per_byte, products)
        with counter, self.attention, saved_tensors_hooks(pack, lambda tensor: tensor):
            value = super().run_node(n)
        made = {tensor.untyped_storage()._cdata: tensor for tensor in counter.kept}
        if key is not None and module is not None and (result := Result.of(value, inputs, module)) is not None:
            here = [*inputs, value, *module.buffers()]
            places = {tensor.untyped_storage()._cdata: place for place, tensor in enumerate(here)}
            kept = ([(places.get(at), tensor) for at, tensor in found.items()] for found in (saved, made))
            known[key] = result, counter.flops, counter.work, *kept
        return value, counter.flops, counter.work, saved, made

    def _nbytes(self, tensor: Tensor) -> float:
        """The bytes of the storage of *tensor*, with floating-point values in the compute type."""
        nbytes = float(tensor.untyped_storage().nbytes())
        return nbytes * self.compute.itemsize / tensor.itemsize if tensor.is_floating_point() else nbytes


def training_flops(module: nn.Module, image_shape: tuple[int, int, int], samples: int = SAMPLES) -> float | None:
    """FLOPs of one of so many images of (channels, height, width), forward and backward, with nothing computed again; None
    where *module*, on meta, cannot be run there.

    What is frozen has no gradient of its own, and passes on others.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        with torch.random.fork_rng(devices=[]), attributes_kept(module), OpCounter() as counter:
            outputs = tree_leaves(module(torch.empty(samples, *image_shape, device="meta")))
            sums = [leaf.sum() for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
            torch.autograd.grad(sums, trained, allow_unused=True)
    except Exception:  # a model of the user's may not run on meta at all
        return None
    return counter.flops / samples


def node_costs(
    graph: fx.GraphModule, image_shape: tuple[int, int, int], device: torch.device, compute: torch.dtype = torch.float32,
    recomputed: Mapping[str, Collection[Key]] | None = None, calls: EqualCalls | None = None,
) -> dict[str, Cost]:  # fmt: skip
    """The cost of each node of *graph* for one image of (channels, height, width), by the node's name.

    A parameter counts where it is used first. *device* is where the graph will run: it decides what an operation that only
    moves memory costs. *compute* is the type of activations; the modules at the paths *recomputed* keep only their inputs, and
    what the products at each path compute. *calls* has what was counted of modules of other graphs, on the same device.
    """
    runner = _CostRunner(graph, device.type, compute, recomputed or {}, calls or EqualCalls())
    with torch.random.fork_rng(devices=[]), attributes_kept(graph):
        runner.run(torch.empty(SAMPLES, *image_shape, device="meta"))
    return runner.costs
