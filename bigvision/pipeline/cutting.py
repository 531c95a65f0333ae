"""Cutting a traced model into stages: which value lives where, what crosses, what is made again, what is a constant.

Only tensors cross a cut. Integers that come from shapes are folded into the later stage: as constants, or as multiples of the
number of samples where they follow it. What does not depend on the images (position tables, masks, None) is made again on
each stage that needs it, unless parameters go into it: then it is made once and crosses.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_map

from bigvision.models.tracing import Runner

SAMPLES = (2, 3)
"""Numbers of images with which a graph is watched; what differs between the two follows the number of samples."""


class CannotCut(Exception):
    """A value cannot be carried over a cut; the message names it and says why."""


@dataclass(frozen=True)
class Spec:
    """A tensor that crosses, without its values."""

    shape: tuple[int, ...]
    """As it travels, with `SAMPLES[0]` images."""
    order: tuple[int, ...]
    """Its dimensions in the order in which they lie in memory, which is how it travels: it arrives laid out as it was."""
    per_sample: tuple[bool, ...]
    """Which dimensions follow the number of samples."""
    dtype: torch.dtype
    requires_grad: bool

    def sizes(self, samples: int) -> tuple[int, ...]:
        """Its shape for *samples* images."""
        return tuple(n * samples // SAMPLES[0] if follows else n for n, follows in zip(self.shape, self.per_sample))

    def nbytes(self, samples: int, compute: torch.dtype) -> int:
        """Its bytes for *samples* images; floating-point values travel in the type *compute*."""
        dtype = compute if self.dtype.is_floating_point else self.dtype
        return torch.Size(self.sizes(samples)).numel() * dtype.itemsize


Leaf = tuple[str, int]
"""A tensor in the graph: the node that makes it and its place among the leaves of the node's value."""


class Watched(Runner):
    """Runs a graph on meta and keeps what each node made."""

    def __init__(self, graph: fx.GraphModule, images: Tensor) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.values: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            self.run(images)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # As it is now: what is changed in place later keeps its shape, but a list may grow.
        self.values[n.name] = tree_map(lambda leaf: leaf, value)
        return value


class Flow:
    """Where the values of a graph come from, and what of them crosses a cut."""

    def __init__(self, graph: fx.GraphModule, image_shape: tuple[int, int, int]) -> None:
        """Watch *graph*, of a model on meta, with images of (channels, height, width). Nothing is computed.

        Raises:
            CannotCut: it does not run.
        """
        self.graph, self.image_shape = graph, image_shape
        self.strides: dict[Leaf, tuple[int, ...]] = {}
        try:
            runs = [Watched(copy.deepcopy(graph), torch.empty(n, *image_shape, device="meta")) for n in SAMPLES]
        except Exception as error:
            raise CannotCut(f"its trace does not run: {(str(error) or type(error).__name__).splitlines()[0]}") from error
        self.values, self.others = (run.values for run in runs)
        self.nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
        self.images = next(node for node in graph.graph.nodes if node.op == "placeholder")
        self.output = next(node for node in graph.graph.nodes if node.op == "output")
        modules, parameters = dict(graph.named_modules()), dict(graph.named_parameters(remove_duplicate=False))
        self.free: set[str] = set()
        """Nodes that depend neither on the images nor on parameters."""
        for node in self.nodes:
            target = str(node.target)
            trained = target in parameters if node.op == "get_attr" else False
            if node.op == "call_module":
                trained = any(True for _ in modules[target].parameters())
            if not trained and all(source.name in self.free for source in node.all_input_nodes):
                self.free.add(node.name)
        position = {node.name: index for index, node in enumerate(self.nodes)}
        self.position: dict[str, int] = {self.images.name: -1}
        """When each node that is not free runs, as an index into `nodes`."""
        for node in self.nodes:
            if node.name in self.free:
                continue
            at = position[node.name]
            if node.op == "get_attr":  # a parameter lives where it is used first
                at = min((position[user.name] for user in node.users if user.name in position), default=at)
            elif node.target is operator.getitem and not isinstance(self.values[self._source(node).name], Tensor):
                at = self.position.get(self._source(node).name, at)  # only what is taken out of a list crosses
            self.position[node.name] = at

    def _source(self, node: fx.Node) -> fx.Node:
        assert isinstance(node.args[0], fx.Node)
        return node.args[0]

    def spec(self, leaf: Leaf) -> Spec:
        """What the tensor *leaf* looks like.

        Raises:
            CannotCut: its shape is neither fixed nor proportional to the number of samples.
        """
        name, place = leaf
        first, second = (tree_flatten(values[name])[0][place] for values in (self.values, self.others))
        strides: tuple[int, ...] = self.strides.get(leaf) or tuple(first.stride())
        order = tuple(sorted(range(first.ndim), key=lambda dimension: -strides[dimension]))
        first, second = first.permute(order), second.permute(order)
        follows = tuple(_follows(name, a, b) for a, b in zip(first.shape, second.shape))
        return Spec(tuple(first.shape), order, follows, first.dtype, first.requires_grad)

    def lay_out(self, device: torch.device) -> None:
        """Find out how tensors lie in memory on *device*: meta does not know in which order a convolution writes.

        Slow, and so done once, when the cuts are known.
        """
        twin = copy.deepcopy(self.graph)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            twin.to_empty(device=device)
            values = Watched(twin, torch.empty(SAMPLES[0], *self.image_shape, device=device)).values
        for node in [self.images, *self.nodes]:
            for place, leaf in enumerate(tree_flatten(values[node.name])[0]):
                if isinstance(leaf, Tensor):
                    self.strides[node.name, place] = leaf.stride()

    def leaves(self, node: fx.Node) -> list[Leaf]:
        """The tensors in what *node* made."""
        return [
            (node.name, place) for place, leaf in enumerate(tree_flatten(self.values[node.name])[0]) if isinstance(leaf, Tensor)
        ]

    def results(self) -> list[Leaf]:
        """The tensors that the model returns."""
        nodes: list[fx.Node] = []
        fx.map_arg(self.output.args[0], nodes.append)
        return [leaf for node in nodes for leaf in self.leaves(node)]

    def lifetimes(self) -> Iterator[tuple[Leaf, int, int]]:
        """Each tensor that may cross: (tensor, when it is made, when it is last used), as indices into `nodes`."""
        for node in [self.images, *self.nodes]:
            if node.name in self.free or not (leaves := self.leaves(node)):
                continue
            last = max((self._when(user) for user in node.users), default=-1)
            for leaf in leaves:
                yield leaf, self.position[node.name], last

    def _when(self, user: fx.Node) -> int:
        return len(self.nodes) if user.op == "output" else self.position.get(user.name, -1)

    def crossing(self, cuts: list[int]) -> list[list[Leaf]]:
        """What crosses each of *cuts*, in the order in which it is made; a cut at p separates the nodes before p from p on."""
        spans = list(self.lifetimes())
        return [[leaf for leaf, made, last in spans if made < cut <= last] for cut in cuts]

    def split(self, cuts: list[int]) -> list[fx.Graph]:
        """The graph of each stage between *cuts*: tensors in, a tuple of tensors out; the last returns the model's output.

        Raises:
            CannotCut: a value that is no tensor cannot be folded.
        """
        bounds = [*cuts, len(self.nodes) + 1]
        crossing = [[], *self.crossing(cuts), []]
        graphs = []
        for number, end in enumerate(bounds):
            start = cuts[number - 1] if number else -1
            graphs.append(_StageGraph(self, crossing[number], crossing[number + 1]).make(start, end))
        return graphs


class _StageGraph:
    """The part of a graph that runs on one stage, while it is made."""

    def __init__(self, flow: Flow, received: list[Leaf], sent: list[Leaf]) -> None:
        self.flow, self.received, self.sent = flow, received, sent
        self.made = fx.Graph()
        self.here: dict[str, Any] = {}
        """What stands for each node of the whole graph: a node of this one, or a value."""
        self.inputs: dict[Leaf, fx.Node] = {}
        """What was received, laid out as where it was made."""
        self.arrived: dict[Leaf, fx.Node] = {}
        """The same, as it travels."""

    def make(self, start: int, end: int) -> fx.Graph:
        flow = self.flow
        if start < 0:
            self.here[flow.images.name] = self.made.placeholder("images")
            self.inputs[flow.images.name, 0] = self.here[flow.images.name]
        for leaf in self.received:
            self.arrived[leaf] = self.made.placeholder(f"{leaf[0]}_{leaf[1]}")
        for leaf, node in self.arrived.items():
            order = flow.spec(leaf).order
            back = tuple(sorted(range(len(order)), key=order.__getitem__))
            self.inputs[leaf] = node if back == tuple(range(len(back))) else self.made.call_method("permute", (node, back))
        for node in sorted(flow.nodes, key=lambda node: flow.position.get(node.name, -1)):
            if start <= flow.position.get(node.name, -2) < end:
                self.here[node.name] = self.made.node_copy(node, self._value)
        if end > len(flow.nodes):
            self.made.output(fx.map_arg(flow.output.args[0], self._value))
        else:
            self.made.output(tuple(self._leaving(leaf) for leaf in self.sent))
        return self.made

    def _value(self, node: fx.Node) -> Any:
        """What stands here for *node* of the whole graph."""
        if node.name not in self.here:
            if node.name in self.flow.free:
                self.here[node.name] = self.made.node_copy(node, self._value)
            else:
                self.here[node.name] = self._rebuilt(node)
        return self.here[node.name]

    def _rebuilt(self, node: fx.Node) -> Any:
        """The value of *node*, made on an earlier stage, from what was received."""
        if (node.name, 0) in self.inputs and isinstance(self.flow.values[node.name], Tensor):
            return self.inputs[node.name, 0]
        paths, _ = tree_flatten_with_path(self.flow.values[node.name])
        others = tree_flatten(self.flow.others[node.name])[0]
        if len(paths) != len(others):
            raise CannotCut(f"the length of {node.name} follows the number of samples")
        parts = [
            self.inputs[node.name, place] if isinstance(first, Tensor) else self._folded(node.name, first, second)
            for place, ((_, first), second) in enumerate(zip(paths, others))
        ]
        return _like(self.flow.values[node.name], iter(parts), node.name)

    def _folded(self, name: str, first: Any, second: Any) -> Any:
        if first is second or (type(first) is type(second) and first == second):
            if isinstance(first, (bool, int, float, str, type(None), torch.dtype, torch.device)):
                return first
            raise CannotCut(f"{name} is a {type(first).__name__}, which cannot be folded")
        if not isinstance(first, int) or not _follows(name, first, second) or first % SAMPLES[0]:
            raise CannotCut(f"{name} is {first} for {SAMPLES[0]} images and {second} for {SAMPLES[1]}")
        factor = first // SAMPLES[0]
        samples = self._samples()
        return samples if factor == 1 else self.made.call_function(operator.mul, (samples, factor))

    def _samples(self) -> fx.Node:
        """The number of samples, from a dimension of something received."""
        for leaf, node in self.inputs.items():
            spec = self.flow.spec(leaf)
            for dimension, (size, follows) in enumerate(zip(spec.shape, spec.per_sample)):
                if follows and size % SAMPLES[0] == 0:
                    total = self.made.call_method("size", (self.arrived.get(leaf, node), dimension))
                    factor = size // SAMPLES[0]
                    return total if factor == 1 else self.made.call_function(operator.floordiv, (total, factor))
        raise CannotCut("nothing that crosses tells the number of samples")

    def _leaving(self, leaf: Leaf) -> fx.Node:
        """The tensor *leaf* as it travels."""
        if leaf in self.arrived:
            return self.arrived[leaf]
        order = self.flow.spec(leaf).order
        node = self._leaf(leaf)
        return node if order == tuple(range(len(order))) else self.made.call_method("permute", (node, order))

    def _leaf(self, leaf: Leaf) -> fx.Node:
        """The node of this graph that is the tensor *leaf*, made here."""
        name, place = leaf
        if leaf in self.inputs:
            return self.inputs[leaf]
        value = self.flow.values[name]
        if isinstance(value, Tensor):
            node = self.here[name]
            # A parameter itself must not be handed on: its owner may free it after the forward pass.
            return self.made.call_method("clone", (node,)) if node.op == "get_attr" else node
        path = tree_flatten_with_path(value)[0][place][0]
        node = self.here[name]
        for key in path:
            node = self.made.call_function(operator.getitem, (node, getattr(key, "idx", getattr(key, "key", None))))
        return node


def _follows(name: str, first: int, second: int) -> bool:
    """Whether a size is proportional to the number of samples; else it is fixed."""
    if first == second:
        return False
    if first * SAMPLES[1] != second * SAMPLES[0]:
        raise CannotCut(f"{name} is of size {first} for {SAMPLES[0]} images and {second} for {SAMPLES[1]}")
    return True


def _like(value: Any, parts: Iterator[Any], name: str) -> Any:
    """*value* with its leaves replaced by *parts*, as an argument in a graph."""
    make: dict[type, Callable[[list[Any]], Any]] = {list: list, tuple: tuple, torch.Size: tuple}
    if type(value) in make:
        return make[type(value)]([_like(item, parts, name) for item in value])
    if type(value) is dict:
        return {key: _like(item, parts, name) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        raise CannotCut(f"{name} is a {type(value).__name__}, which cannot cross")
    return next(parts)
