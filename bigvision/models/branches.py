"""Where the residual branches of a model begin and end: what `drop_path.py` can run on a part of the samples.

Each module with a `DropPath` is traced with the arguments that it gets for two and for three images; a branch is what goes
nowhere but into its `DropPath`, back to the calls whose arguments have a row for each sample.
"""

from __future__ import annotations

import copy
import functools
import inspect
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from bigvision.models.blocks import Block, kinds
from bigvision.models.tracing import CoarseTracer, Runner, first_line

SAMPLES = (2, 3)  # images with which a model is watched; a size that differs follows the number of samples


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
