"""Stochastic depth (Huang et al. 2016) without the work: a residual branch runs on the samples that it keeps.

timm's `DropPath` gets a branch's output for all samples and zeroes that of some. Here the samples are drawn before: the modules
by which a branch is entered take the kept samples out of their inputs, and its `DropPath` puts them back among zeros. The
forward of a block stays timm's own: a torch.fx trace of it only tells where branches begin.
"""

from __future__ import annotations

import copy
import functools
import inspect
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from bigvision.errors import UserError
from bigvision.models.blocks import Block, kinds
from bigvision.models.tracing import CoarseTracer, Runner, first_line
from bigvision.samples import seed_from

SAMPLES = (2, 3)  # images with which a model is watched; a size that differs follows the number of samples
LEAST = 2  # samples that a branch runs on
MISSED = 0.1  # how far the share of the samples that are dropped may be from the rate, as a part of the rate


def set_constant_rate(module: nn.Module, rate: float, model: str) -> None:
    """Give every `DropPath` of *module*, the timm *model*, the *rate*. timm builds an `Identity` where the rate is 0."""
    places = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children()]
    known = {(type(parent), name) for parent, name, child in places if isinstance(child, DropPath) and not name.isdigit()}
    if not known:
        words = f"constant, but {model} has no timm DropPath in which a rate could be set"
        raise UserError(f"model.drop_path_schedule: {words}; use linear")
    for parent, name, child in places:
        if isinstance(child, DropPath):
            child.drop_prob = rate
        elif type(child) is nn.Identity and (type(parent), name) in known:
            setattr(parent, name, DropPath(rate))


def kept_samples(samples: int, rate: float) -> int | None:
    """On how many of so many *samples* a branch of this *rate* runs; None where it runs on all and is masked."""
    kept = round(samples * (1 - rate))
    if kept < LEAST or kept == samples or abs(1 - kept / samples - rate) > MISSED * rate:
        return None
    return kept


# What runs.


@dataclass(frozen=True)
class Drawn:
    """Which samples of a micro-batch a branch keeps."""

    origin: Tensor  # int64 (samples,): the place of each among those that the branch runs on, -1 where it is dropped
    factor: Tensor  # 0-D: what the output is multiplied with
    kept: Tensor  # int64, ascending: the samples that the branch runs on, which may be all

    @property
    def rows(self) -> Tensor | None:
        """The samples to take out, None where the branch runs on all. Compiled code always takes some: blocks share a graph."""
        return self.kept if torch.compiler.is_compiling() or len(self.kept) < len(self.origin) else None


class Branch:
    """A residual branch, with the samples that were drawn for it last."""

    drawn: Drawn | None = None
    whole: bool = False  # whether it runs on all samples in any case, and drops those that were drawn

    def __init__(self, path: str, drop: SkippingDropPath) -> None:
        self.path, self.drop = path, drop


class SkippingDropPath(DropPath):
    """Puts what a branch has made of the kept samples back among zeros. Where none were drawn it is timm's `DropPath`."""

    branches: list[Branch]  # one for each call in a forward pass
    branch: Branch  # that of the next call

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        drawn = self.branch.drawn
        if drawn is None:
            return super().forward(x)
        if (rows := drawn.rows) is None:
            return x * ((drawn.origin >= 0) * drawn.factor).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return _Put.apply(x, rows, drawn.origin, drawn.factor)


class _Entry:
    """Takes the kept samples out of the arguments of a call by which a branch is entered: those at *places* and *names*."""

    def __init__(self, branch: Branch, places: Iterable[int], names: Iterable[str]) -> None:
        self.branch, self.places, self.names = branch, frozenset(places), frozenset(names)

    def __call__(self, module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        drop, drawn = self.branch.drop, self.branch.drawn
        if drawn is None or not drop.training:
            return None
        if len(drop.branches) > 1:
            drop.branch = self.branch
        if (rows := drawn.rows) is None:
            return None
        args = tuple([_Take.apply(x, rows, drawn.origin) if at in self.places else x for at, x in enumerate(args)])
        return args, {name: _Take.apply(x, rows, drawn.origin) if name in self.names else x for name, x in kwargs.items()}


class _Method:
    """A method of a block by which a branch is entered."""

    def __init__(self, method: Callable[..., Any], entry: _Entry) -> None:
        self.method, self.entry = method, entry

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = self.entry(None, args, kwargs) or (args, kwargs)
        return self.method(*args, **kwargs)


class _Take(torch.autograd.Function):
    """The *kept* rows of a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, origin: Tensor) -> Tensor:
        ctx.save_for_backward(kept, origin)
        return _taken(x, kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _put(gradients[0], *ctx.saved_tensors), None, None


class _Put(torch.autograd.Function):
    """Rows times *factor* at the places of the *kept* ones, zeros at the others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, origin: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(kept, origin, factor)
        return _put(x * factor, kept, origin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        kept, origin, factor = ctx.saved_tensors
        if torch.compiler.is_compiling():  # there the kept ones may be all, and those that are dropped among them
            factor = ((origin.index_select(0, kept) >= 0) * factor).view(-1, *[1] * (gradients[0].ndim - 1))
        return (_taken(gradients[0], kept) * factor).to(gradients[0].dtype), None, None, None


def _taken(x: Tensor, kept: Tensor) -> Tensor:
    order, back = _layout(x)
    return x.permute(order).index_select(0, kept).permute(back)


def _put(x: Tensor, kept: Tensor, origin: Tensor) -> Tensor:
    order, back = _layout(x)
    rows = x.permute(order)
    if torch.compiler.is_compiling():
        # One read by place fuses with what is around it; writing by place does not.
        found = rows.index_select(0, origin.clamp(min=0))
        return torch.where((origin >= 0).view(-1, *[1] * (x.ndim - 1)), found, 0.0).to(x.dtype).permute(back)
    whole = rows.new_zeros((len(origin), *rows.shape[1:]))
    return whole.index_copy_(0, kept, rows).permute(back)


def _layout(x: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions of *x* as they lie in memory, so that a copy of its rows lies so too; and the way back."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return [0, 2, 3, 1], [0, 3, 1, 2]
    return [*range(x.ndim)], [*range(x.ndim)]


# Where branches begin and end.


@dataclass(frozen=True)
class Opening:
    """A call by which samples enter a branch."""

    path: str  # of the module that is called, or that has the method
    method: str  # empty where the module itself is called
    places: tuple[int, ...]  # the positional arguments that have a row for each sample
    names: tuple[str, ...]  # the keyword arguments that have


@dataclass(frozen=True)
class Found:
    """A branch in a model: from the calls that enter it to a call of a `DropPath`."""

    path: str  # of the DropPath
    openings: tuple[Opening, ...]

    @property
    def within(self) -> str:
        """The path of the innermost module that has all of it."""
        paths = [path.replace(".", "/") for path in (self.path, *(one.path for one in self.openings))]
        return posixpath.commonpath(paths).replace("/", ".")

    def moved(self, old: str, new: str) -> Found:
        """The same branch in a block at another path."""
        openings = tuple(Opening(new + one.path.removeprefix(old), one.method, one.places, one.names) for one in self.openings)
        return Found(new + self.path.removeprefix(old), openings)


class Masked(Exception):
    """A branch cannot run on a part of the samples; the message says why."""


def dropping(module: nn.Module) -> dict[str, DropPath]:
    """The modules by path that drop anything in training."""
    found = {path: part for path, part in module.named_modules() if type(part) is DropPath}
    return {path: part for path, part in found.items() if part.drop_prob > 0}


def find_branches(module: nn.Module, image_shape: tuple[int, int, int]) -> tuple[list[Found], dict[str, str]]:
    """The branches of *module*, on meta, that can run on a part of the samples; and by the paths of other `DropPath`s why not.

    *image_shape* is (channels, height, width). Nothing is computed, and the module is left as it is.
    """
    drops = dropping(module)
    parents = {path: _ancestors(path) for path in drops}
    try:
        twin = copy.deepcopy(module).to("meta").train()
        calls = _watched(twin, image_shape, {parent for those in parents.values() for parent in those})
    except Exception as error:  # a user's model may not be copied, or not run on meta
        return [], dict.fromkeys(drops, f"the model does not run without values ({first_line(error)})")
    holders = Counter(part for _, part in twin.named_modules(remove_duplicate=False))
    forwards: dict[tuple[str, bool], _Forward] = {}
    found, masked = list[Found](), dict[str, str]()
    for path in drops:
        called = [parent for parent in parents[path] if calls[parent]]
        if any(len(calls[parent]) != len(SAMPLES) for parent in called):
            masked[path] = "what it is in is called several times in a forward pass"
            continue
        for followed in (False, True):
            key = called[0], followed
            try:
                if key not in forwards:
                    forwards[key] = _Forward(twin, *key, calls[called[0]], holders)
                found += forwards[key].branches(path)
                masked.pop(path, None)
                break
            except Masked as reason:
                masked.setdefault(path, str(reason))
    return found, masked


def in_equal_blocks(found: Sequence[Found], module: nn.Module, blocks: Sequence[Block]) -> list[Found]:
    """The branches that are *found* in one of several equal *blocks* of *module*, in those of them where nothing drops."""
    paths, known, more = {block.module: block.path for block in blocks}, {one.path for one in found}, list[Found]()
    for group in kinds([block.module for block in blocks]):
        here = {paths[block]: [one for one in found if one.path.startswith(f"{paths[block]}.")] for block in group}
        for new in here:
            for old, ones in here.items():
                moved = [one.moved(old, new) for one in ones]
                moved = [o for o in moved if o.path not in known and type(module.get_submodule(o.path)) is nn.Identity]
                more += moved
                known |= {one.path for one in moved}
    return more


def _ancestors(path: str) -> list[str]:
    """The paths of the modules that *path* is in, innermost first."""
    parts = path.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]


def _watched(twin: nn.Module, image_shape: tuple[int, int, int], paths: set[str]) -> dict[str, list[Any]]:
    """The arguments of each call of the modules at *paths*, with each of so many `SAMPLES`."""
    calls: dict[str, list[Any]] = {path: [] for path in paths}
    hooks = [
        twin.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: calls[path].append((args, kwargs)), with_kwargs=True
        )
        for path in paths
    ]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for samples in SAMPLES:
            twin(torch.empty(samples, *image_shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return calls


class _BlockTracer(CoarseTracer):
    """Follows a module's forward for the arguments of one call: tensors vary, all else is as it is there.

    Calls of the module's own methods are nodes too, unless they are *followed*.
    """

    def __init__(self, arguments: dict[str, Any], followed: bool) -> None:
        super().__init__(set())
        self.arguments, self.followed = arguments, followed
        self.methods: dict[Any, str] = {}

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        def variable(leaf: Any) -> Any:
            return self.create_proxy("placeholder", "x", (), {}) if isinstance(leaf, Tensor) else leaf

        return root_fn, [self.root, *tree_map(variable, list(self.arguments.values()))]

    def graph_of(self, module: nn.Module) -> fx.Graph:
        names = [] if self.followed else _own_methods(module)
        self.methods = {getattr(module, name): name for name in names}
        try:
            vars(module).update({name: functools.partial(self._called, method) for method, name in self.methods.items()})
            return self.trace(module)
        finally:
            for name in names:
                del vars(module)[name]

    def _called(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(leaf, fx.Proxy) for leaf in tree_leaves((args, kwargs))):
            return method(*args, **kwargs)
        return self.create_proxy("call_function", method, args, kwargs)


def _own_methods(module: nn.Module) -> list[str]:
    classes = [one for one in type(module).__mro__ if one not in nn.Module.__mro__ and not one.__module__.startswith("torch.")]
    names = {name: member for one in reversed(classes) for name, member in vars(one).items()}
    return [
        name for name, member in names.items()
        if inspect.isfunction(member) and name != "forward" and not name.startswith("__") and name not in vars(module)
    ]  # fmt: skip


class _Forward:
    """The forward of the module at *path* as a graph, and what its nodes make of each number of `SAMPLES`."""

    def __init__(
        self, model: nn.Module, path: str, followed: bool, calls: Sequence[tuple[Any, Any]], holders: Counter[nn.Module]
    ) -> None:  # fmt: skip
        """*holders*: at how many places of *model* each module is."""
        self.path, self.module, self.holders = path, model.get_submodule(path), holders
        try:
            bound = [_bound(self.module, *call) for call in calls]
            tracer = _BlockTracer(bound[0], followed)
            self.graph = tracer.graph_of(self.module)
            self.values = [self._run(arguments) for arguments in bound]
        except Exception as error:
            raise Masked(f"its forward cannot be followed ({first_line(error)})") from error
        self.methods = tracer.methods
        self.calls = Counter(node.target for node in self.graph.nodes if node.op in ("call_module", "call_function"))

    def _run(self, arguments: dict[str, Any]) -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {}

        class Keeping(Runner):
            def run_node(self, n: fx.Node) -> Any:
                values[n] = super().run_node(n)
                return values[n]

        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            tensors = [leaf for leaf in tree_leaves(list(arguments.values())) if isinstance(leaf, Tensor)]
            Keeping(self.module, graph=self.graph).run(*tensors)
        return values

    def branches(self, path: str) -> list[Found]:
        """Those that end at the `DropPath` at *path*, one for each of its calls."""
        name = path.removeprefix(f"{self.path}.") if self.path else path
        calls = [node for node in self.graph.nodes if node.op == "call_module" and node.target == name]
        if not calls:
            raise Masked("its forward cannot be followed to where it drops")
        if self._shared(name):
            raise Masked("several modules share it")
        return [Found(path, self._openings(node)) for node in calls]

    def _openings(self, drop: fx.Node) -> tuple[Opening, ...]:
        """The calls by which samples enter what ends at *drop*, and nowhere else."""
        if self._kind(drop.all_input_nodes[0]) != "samples":
            raise Masked("what it drops are not samples")
        barred: set[fx.Node] = set()
        while True:
            inside = self._inside(drop, barred)
            wrong = {node for node in inside if not self._can_begin(node, inside)}
            if not wrong:
                break
            barred |= wrong
        parts = self._modules(inside)
        if any(_mixes_samples(part) for part in parts):
            raise Masked("BatchNorm in it mixes samples")
        if any(dropping(part) for part in parts):
            raise Masked("there are others in it")
        if not any(parameter.ndim > 1 for part in parts for parameter in part.parameters()):
            raise Masked("no layer can be left out")
        found = []
        for node in reversed(inside):
            places = tuple(place for place, part in enumerate(node.args) if self._enters(part, inside))
            names = tuple(name for name, part in node.kwargs.items() if self._enters(part, inside))
            if places or names:
                method = self.methods.get(node.target, "")
                path = self.path if method else ".".join(filter(None, (self.path, str(node.target))))
                found.append(Opening(path, method, places, names))
        return tuple(found)

    def _inside(self, drop: fx.Node, barred: set[fx.Node]) -> list[fx.Node]:
        """The nodes whose values go nowhere but to *drop*, last first."""
        inside = {drop: None}
        for node in reversed(self.graph.nodes):
            called = node.op in ("call_module", "call_function", "call_method") and node not in barred
            if called and node.users and all(user in inside for user in node.users):
                inside[node] = None
        return [node for node in inside if node is not drop]

    def _can_begin(self, node: fx.Node, inside: list[fx.Node]) -> bool:
        """Whether *node* needs nothing of all samples from outside, or can be given the kept ones."""
        outer = [source for source in node.all_input_nodes if source not in inside]
        kinds = {source: self._kind(source) for source in outer}
        if "other" in kinds.values():
            return False
        entering = [source for source in outer if kinds[source] == "samples"]
        if not entering:
            return True
        direct = [part for part in (*node.args, *node.kwargs.values()) if isinstance(part, fx.Node)]
        called = node.op == "call_module" or node.target in self.methods
        if node.op == "call_module" and self._shared(str(node.target)):
            return False
        return called and self.calls[node.target] == 1 and all(source in direct for source in entering)

    def _enters(self, part: Any, inside: list[fx.Node]) -> bool:
        return isinstance(part, fx.Node) and part not in inside and self._kind(part) == "samples"

    def _kind(self, node: fx.Node) -> str:
        """What the value of *node* has of the samples: "samples" (a row for each), "nothing", or "other"."""
        few, many = (values[node] for values in self.values)
        if isinstance(few, Tensor) and isinstance(many, Tensor):
            if few.shape == many.shape:
                return "nothing"
            rows = few.ndim > 0 and (few.shape[0], many.shape[0]) == SAMPLES and few.shape[1:] == many.shape[1:]
            return "samples" if rows else "other"
        leaves = list(zip(tree_leaves(few), tree_leaves(many)))
        same = all(a.shape == b.shape if isinstance(a, Tensor) else a is b or a == b for a, b in leaves)
        return "nothing" if same and len(tree_leaves(few)) == len(tree_leaves(many)) else "other"

    def _shared(self, name: str) -> bool:
        return self.holders[self.module.get_submodule(name)] > 1

    def _modules(self, inside: list[fx.Node]) -> list[nn.Module]:
        """The modules that may run inside. A method may call any that the graph does not."""
        called = {str(node.target): node for node in self.graph.nodes if node.op == "call_module"}
        names = [name for name, node in called.items() if node in inside]
        if any(node.target in self.methods for node in inside):
            names += [name for name, _ in self.module.named_children() if name not in called]
        return [self.module.get_submodule(name) for name in names]


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of *module* by position."""
    signature = inspect.signature(module.forward)
    taken = {parameter.kind for parameter in signature.parameters.values()}
    if taken - {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}:
        raise TypeError("it takes arguments by name only, or any number of them")
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _mixes_samples(module: nn.Module) -> bool:
    """Whether *module* has BatchNorm of some kind, for which samples are a population."""
    parts = list(module.modules())
    return any(isinstance(part, BatchNorm) or getattr(part, "running_var", None) is not None for part in parts)


def rates_of_branches(module: nn.Module, blocks: Iterable[str], image_shape: tuple[int, int, int]) -> dict[str, list[float]]:
    """Of each of *blocks* of *module*, on meta, the rates of its branches: 0 for one that runs on all samples in any case.

    A branch that is made of blocks counts for each of them. *image_shape*: (channels, height, width).
    """
    skipped, rates = {one.path for one in find_branches(module, image_shape)[0]}, dict[str, list[float]]()
    for path, drop in dropping(module).items():
        holder = f"{path.rpartition('.')[0]}."
        for block in blocks:
            if holder.startswith(f"{block}.") or block.startswith(holder):
                rates.setdefault(block, []).append(drop.drop_prob if path in skipped else 0.0)
    return rates


# The branches of a model while it trains.


class SkippedBranches:
    """The branches of a model that run on a part of the samples, and which samples were drawn for them."""

    def __init__(self, found: Sequence[Found], module: nn.Module, device: torch.device, compiled: bool = False) -> None:
        """Change *module* in place, whose names stay: from now on its branches leave samples out where some were drawn.

        *compiled*: all branches then have tensors of the same kinds, so that blocks share a graph.
        """
        self.device, self.compiled = device, compiled
        self.masks = False  # whether nothing is drawn: modules then mask as timm's do
        self.branches: list[Branch] = []
        self.parts: set[nn.Module] = set()  # modules that branches may run on the kept samples
        self.drawn: list[Drawn] | None = None
        self._factors: dict[tuple[Any, ...], list[Tensor]] = {}
        for one in found:
            drop: Any = module.get_submodule(one.path)
            if not isinstance(drop, SkippingDropPath):
                drop.__class__ = SkippingDropPath
                vars(drop).update({"drop_prob": 0.0, "scale_by_keep": True, "branches": []} | vars(drop))
            self.parts.update([*module.get_submodule(one.within).modules()][1:])
            branch = drop.branch = Branch(one.path, drop)
            drop.branches.append(branch)
            self.branches.append(branch)
            for opening in one.openings:
                entered, entry = module.get_submodule(opening.path), _Entry(branch, opening.places, opening.names)
                if opening.method:
                    vars(entered)[opening.method] = _Method(getattr(entered, opening.method), entry)
                else:
                    entered.register_forward_pre_hook(entry, with_kwargs=True)

    @classmethod
    def of(
        cls, module: nn.Module, blocks: Sequence[Block], image_shapes: Iterable[tuple[int, int, int]], device: torch.device,
        compiled: bool, micro_batch: int,
    ) -> tuple[SkippedBranches | None, str]:  # fmt: skip
        """The branches of *module*, on meta, and a line for the log; None where no branch can leave samples out.

        *image_shapes*: (channels, height, width) of all images that it gets. *compiled*: whether the *blocks* will be.
        """
        drops, found, masked = dropping(module), list[Found](), dict[str, str]()
        for number, shape in enumerate(image_shapes):
            here, others = find_branches(module, shape)
            # Of a small image one window may be all there is, and rows of windows be taken for samples.
            masked |= others | {one.path: "it depends on the size of images" for one in found if one not in here}
            found = [one for one in here if number == 0 or one in found]
        found = [one for one in found if one.path not in masked]
        holders: dict[str, list[str]] = {}
        for path, drop in drops.items():
            reason = masked.get(path)
            if reason is None and kept_samples(micro_batch, drop.drop_prob) is None:
                reason = f"no number of samples is within {MISSED:.0%} of its rate"
            holders.setdefault(path.rpartition(".")[0], []).append(reason or "")
        reasons = Counter(next(filter(None, those)) for those in holders.values() if any(those))
        note = f"model.drop_path_mode: skip in {len(holders) - reasons.total()} of {len(holders)} blocks with stochastic depth"
        note += f", for a micro-batch of {micro_batch} samples"
        if reasons:
            note += f"; mask in {'; in '.join(f'{count}: {reason}' for reason, count in reasons.most_common())}"
        if not found:
            return None, note
        more = in_equal_blocks(found, module, blocks) if compiled else []
        return cls([*found, *more], module, device, compiled), note

    def run_whole(self, blocks: Iterable[str]) -> None:
        """Run the branches that are in none of the modules at the paths *blocks* on all samples; dropped are the same ones."""
        inside = tuple(f"{path}." for path in blocks)
        for branch in self.branches:
            branch.whole = not branch.path.startswith(inside)

    def draw(self, samples: int, *place: int) -> None:
        """Draw for a micro-batch of so many *samples* at this *place* in the run, of which the draw is a function."""
        if self.masks:
            return
        generator = torch.Generator().manual_seed(seed_from("drop_path", *place))
        rates = [branch.drop.drop_prob for branch in self.branches]
        counts = [kept_samples(samples, rate) or samples for rate in rates]
        drawn = torch.rand(len(rates), samples, generator=generator, dtype=torch.float64)
        rate, count = torch.tensor(rates, dtype=torch.float64)[:, None], torch.tensor(counts)[:, None]
        skips, everyone = count < samples, torch.arange(samples).expand(len(rates), -1)
        keep = torch.where(skips, drawn.argsort(dim=1).argsort(dim=1) < count, drawn >= rate)
        origin = torch.where(keep, torch.where(skips, keep.cumsum(dim=1) - 1, everyone), -1)
        kept = torch.where(skips, (~keep).to(torch.uint8).argsort(dim=1, stable=True), everyone)
        # Rows of an even number of elements: compiled code reads tensors faster that begin at multiples of 16 bytes.
        table = torch.zeros(2, len(rates), samples + samples % 2, dtype=torch.int64)
        table[:, :, :samples] = torch.stack([origin, kept])
        if self.device.type == "cuda":
            table = table.pin_memory()
        table = table.to(self.device, non_blocking=True)
        factors = self._factors_of(samples, rates, counts)
        counts = [samples if branch.whole else count for branch, count in zip(self.branches, counts)]
        rows = zip(*table, counts, factors)
        self._set([Drawn(origin[:samples], factor, kept[:count]) for origin, kept, count, factor in rows])

    def _factors_of(self, samples: int, rates: list[float], counts: list[int]) -> list[Tensor]:
        """What the output of each branch is multiplied with, so that its expectation is that of all samples."""
        if (key := (samples, *rates)) not in self._factors:
            values = [samples / count if count < samples else 1 / (1 - rate) for rate, count in zip(rates, counts)]
            self._factors[key] = [
                torch.full((), value if branch.drop.scale_by_keep else 1.0, device=self.device)
                for branch, value in zip(self.branches, values)
            ]
        return self._factors[key]

    def clear(self) -> None:
        """Forget what was drawn: a forward pass of anything else has other samples."""
        self._set(None)

    def _set(self, drawn: list[Drawn] | None) -> None:
        self.drawn = drawn
        for branch, one in zip(self.branches, drawn or [None] * len(self.branches)):
            branch.drawn = one
            if self.compiled and one is not None:
                torch._dynamo.maybe_mark_dynamic(one.kept, 0)

    @contextmanager
    def using(self, drawn: list[Drawn] | None) -> Iterator[None]:
        """Compute again with what was *drawn* then: pipelines draw for other micro-batches in between."""
        now = self.drawn
        if now is not drawn:
            self._set(drawn)
        try:
            yield
        finally:
            if now is not drawn:
                self._set(now)
