"""Cutting a traced model into stages: which value lives where, what crosses, what is made again, what is a constant.

Only tensors cross a cut. Integers that come from shapes are folded into the later stage: as constants, or as multiples of the
number of samples where they follow it. What does not depend on the images (position tables, masks, None) is made again on
each stage that needs it, unless parameters go into it: then it is made once and crosses.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import key_get, tree_flatten, tree_flatten_with_path, tree_leaves, tree_map, tree_unflatten

from bigvision.models.alike import EqualCalls, tensors_in
from bigvision.models.tracing import Runner, first_line, named_tensors, tensors_of

SAMPLES = (2, 3)  # numbers of images with which a graph is watched; what differs follows the number of samples


class CannotCut(Exception):
    """A value cannot be carried over a cut; the message names it and says why."""


@dataclass(frozen=True)
class Spec:
    """A tensor that crosses, without its values."""

    shape: tuple[int, ...]  # as it travels, with `SAMPLES[0]` images
    order: tuple[int, ...]  # its dimensions as they lie in memory: it travels so and arrives laid out as it was
    per_sample: tuple[bool, ...]  # which dimensions follow the number of samples
    dtype: torch.dtype
    requires_grad: bool

    def sizes(self, samples: int) -> tuple[int, ...]:
        """Its shape for *samples* images."""
        return tuple(n * samples // SAMPLES[0] if follows else n for n, follows in zip(self.shape, self.per_sample))

    def type_in(self, compute: torch.dtype | None) -> torch.dtype:
        """Its type where floating-point values are in *compute*."""
        return compute if compute and self.dtype.is_floating_point else self.dtype

    def nbytes(self, samples: int, compute: torch.dtype | None = None) -> int:
        """Its bytes for *samples* images."""
        return math.prod(self.sizes(samples)) * self.type_in(compute).itemsize

    def empty(self, samples: int, compute: torch.dtype | None = None, device: torch.device | str = "meta") -> Tensor:
        """Such a tensor for *samples* images, floating-point values in the type *compute*; without gradient under no_grad."""
        requires_grad = self.requires_grad and torch.is_grad_enabled()
        return torch.empty(self.sizes(samples), dtype=self.type_in(compute), device=device, requires_grad=requires_grad)


Leaf = tuple[str, int]  # a tensor in the graph: the node that makes it and its place among the leaves of the node's value


class _Watched(Runner):
    """Runs a graph, of a model on meta, and keeps what each node makes: fake tensors, as they would lie on *device*."""

    def __init__(self, graph: fx.GraphModule, device: torch.device, calls: EqualCalls) -> None:
        super().__init__(graph)
        self.device, self.calls = device, calls
        self.values: dict[str, Any] = {}
        # Not on meta, which does not know in which order a convolution writes.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._used: dict[str, Any] = {}
        self._fakes: dict[Tensor, Tensor] = {}

    def watch(self, images: tuple[int, ...]) -> dict[str, Any]:
        """What each node makes of so many images."""
        self.values = {}
        with self.mode, torch.random.fork_rng(devices=[]):
            self.run(torch.empty(images, device=self.device))
        return self.values

    def fetch_attr(self, target: str) -> Any:
        """The module or tensor at the path *target*, with fake tensors: made when it is first used, as few modules are run."""
        if target not in self._used:
            found = super().fetch_attr(target)
            tensors = [tensor for _, tensor in named_tensors(found)] if isinstance(found, nn.Module) else tensors_in(found)
            # What a deep copy is told to have copied already, it takes as it is.
            self._used[target] = copy.deepcopy(found, {id(tensor): self._fake(tensor) for tensor in tensors})
        return self._used[target]

    def _fake(self, tensor: Tensor) -> Tensor:
        """What stands for *tensor*, which is on meta, on the device."""
        if tensor not in self._fakes:
            fake = torch.empty_like(tensor, device=self.device, requires_grad=False)
            trained = isinstance(tensor, nn.Parameter)
            self._fakes[tensor] = nn.Parameter(fake, tensor.requires_grad) if trained else fake
        return self._fakes[tensor]

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, twin = functools.partial(super().call_module, target, args, kwargs), functools.partial(self.fetch_attr, target)
        return self.calls.run(super().fetch_attr(target), call, args, kwargs, twin)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        # As it is now: what is changed in place later keeps its shape, but a list may grow. A Size cannot hold nodes.
        self.values[n.name] = tree_map(
            lambda leaf: tuple(leaf) if isinstance(leaf, torch.Size) else leaf, value,
            is_leaf=lambda part: isinstance(part, torch.Size),
        )  # fmt: skip
        return value


class Flow:
    """Where the values of a graph come from, and what of them crosses a cut."""

    def __init__(
        self, graph: fx.GraphModule, image_shape: tuple[int, int, int], device: torch.device, calls: EqualCalls | None = None
    ) -> None:
        """Watch *graph*, of a model on meta that will run on *device*, with images of (channels, height, width).

        Nothing is computed. *calls* has what is known of modules from other graphs, on the same device. Raises `CannotCut`
        when it does not run.
        """
        try:
            watched = _Watched(graph, device, calls or EqualCalls())
            self.values, self.others = (watched.watch((count, *image_shape)) for count in SAMPLES)
        except Exception as error:
            raise CannotCut(f"its trace does not run: {first_line(error)}") from error
        self.graph = graph
        self.images, *self.nodes, self.output = graph.graph.nodes
        self.called = [str(node.target) if node.op == "call_module" else "" for node in self.nodes]  # module paths, or ""
        self.free: set[str] = set()  # nodes that depend neither on the images nor on parameters
        for node in self.nodes:
            trained = any(isinstance(tensor, nn.Parameter) for tensor in tensors_of(node, graph))
            if not trained and all(source.name in self.free for source in node.all_input_nodes):
                self.free.add(node.name)
        index = {node.name: index for index, node in enumerate(self.nodes)}
        self.position = {self.images.name: -1, self.output.name: len(self.nodes)}  # when each node runs; free ones are absent
        for node in self.nodes:
            at, sources = index[node.name], node.all_input_nodes
            if node.op == "get_attr":  # a parameter lives where it is used first
                at = min((index[user.name] for user in node.users if user.name in index), default=at)
            elif node.target is operator.getitem and not isinstance(self.values[sources[0].name], Tensor):
                at = self.position.get(sources[0].name, at)  # only what is taken out of a list crosses
            if node.name not in self.free:
                self.position[node.name] = at
        last = {node: max((self.position.get(user.name, -1) for user in node.users), default=-1) for node in graph.graph.nodes}
        self._reaches = [(self.position[node.name], last[node], node) for node in (self.images, *self.nodes)
                         if node.name in self.position]  # fmt: skip
        """Between which positions the value of each node lives."""
        self.spec = functools.cache(self._spec)

    def _spec(self, leaf: Leaf) -> Spec:
        """The shape and type of *leaf*; raises `CannotCut` where sizes are neither fixed nor proportional to the samples."""
        name, place = leaf
        first, second = (tree_leaves(values[name])[place] for values in (self.values, self.others))
        strides = first.stride()
        order = tuple(sorted(range(first.ndim), key=lambda dimension: -strides[dimension]))
        shape, other = (tuple(one.shape[dimension] for dimension in order) for one in (first, second))
        follows = tuple(_follows(name, a, b) for a, b in zip(shape, other))
        return Spec(shape, order, follows, first.dtype, first.requires_grad)

    def leaves(self, nodes: Sequence[fx.Node]) -> list[Leaf]:
        """The tensors in what *nodes* make."""
        made = ((node.name, enumerate(tree_leaves(self.values[node.name]))) for node in nodes)
        return [(name, place) for name, leaves in made for place, leaf in leaves if isinstance(leaf, Tensor)]

    def crossing(self, cut: int) -> list[Leaf]:
        """What crosses *cut*, which separates the nodes before it from it on, in the order in which it is made."""
        return self.leaves([node for made, used, node in self._reaches if made < cut <= used])

    def split(self, cuts: list[int]) -> tuple[list[fx.Graph], list[tuple[Spec, ...]]]:
        """The graph of each stage between *cuts*, and the tensors that leave it: of the last, those of the model's output.

        A graph takes tensors and returns a tuple of tensors; the last returns the model's output. Raises `CannotCut` when a
        value that is no tensor cannot be folded.
        """
        leaving = [*map(self.crossing, cuts), self.leaves(self.output.all_input_nodes)]
        bounds = pairwise([-1, *cuts, len(self.nodes) + 1])
        graphs = [_StageGraph(self, *bound, *leaves).graph for bound, leaves in zip(bounds, pairwise([[], *leaving]))]
        sends = [tuple(map(self.spec, leaves)) for leaves in leaving]
        for graph, received in zip(graphs[1:], sends):
            # A stage copies those of its inputs that it changes in place: autograd forbids that for what was received.
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                inputs = [spec.empty(SAMPLES[0]) for spec in received]
                Runner(copy.deepcopy(self.graph), graph=graph).run(*inputs)
            placeholders = [node for node in graph.nodes if node.op == "placeholder"]
            for node, tensor in zip(placeholders, inputs):
                if tensor._version:
                    with graph.inserting_after(placeholders[-1]):
                        copied = graph.call_method("clone", (node,))
                    node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
        return graphs, sends


class _StageGraph:
    """The part of a graph that runs on one stage, while it is made."""

    def __init__(self, flow: Flow, start: int, end: int, received: list[Leaf], sent: list[Leaf]) -> None:
        self.flow, self.graph = flow, fx.Graph()
        self.arrived = {leaf: self.graph.placeholder(f"{leaf[0]}_{leaf[1]}") for leaf in received}  # received, as it travels
        self.inputs: dict[Leaf, fx.Node] = {}  # the same, laid out as where it was made
        for leaf, node in self.arrived.items():
            order = flow.spec(leaf).order
            self.inputs[leaf] = _permuted(node, tuple(sorted(range(len(order)), key=order.__getitem__)))
        self.here: dict[str, Any] = {}  # what stands for each node of the whole graph: a node of this one, or a value
        for node in sorted((flow.images, *flow.nodes), key=lambda node: flow.position.get(node.name, -1)):
            if start <= flow.position.get(node.name, start - 1) < end:
                self.here[node.name] = self.graph.node_copy(node, self._value)
        last = end > len(flow.nodes)
        self.graph.output(fx.map_arg(flow.output.args[0], self._value) if last else tuple(map(self._leaving, sent)))

    def _value(self, node: fx.Node) -> Any:
        """What stands here for *node* of the whole graph."""
        if node.name not in self.here:
            free = node.name in self.flow.free
            self.here[node.name] = self.graph.node_copy(node, self._value) if free else self._rebuilt(node.name)
        return self.here[node.name]

    def _rebuilt(self, name: str) -> Any:
        """The value of the node *name*, made on an earlier stage, from what was received."""
        first, structure = tree_flatten(self.flow.values[name])
        second = tree_leaves(self.flow.others[name])
        if len(first) != len(second):
            raise CannotCut(f"the length of {name} follows the number of samples")
        parts = [
            self.inputs[name, place] if isinstance(one, Tensor) else self._folded(name, one, other)
            for place, (one, other) in enumerate(zip(first, second))
        ]
        return tree_unflatten(parts, structure)

    def _folded(self, name: str, first: Any, second: Any) -> Any:
        if first is second or (type(first) is type(second) and first == second):
            if isinstance(first, (bool, int, float, str, type(None), torch.dtype, torch.device)):
                return first
            raise CannotCut(f"{name} is a {type(first).__name__}, which cannot be folded")
        if not isinstance(first, int) or not _follows(name, first, second) or first % SAMPLES[0]:
            raise CannotCut(f"{name} is {first} for {SAMPLES[0]} images and {second} for {SAMPLES[1]}")
        factor = first // SAMPLES[0]
        samples = self._samples()
        return samples if factor == 1 else self.graph.call_function(operator.mul, (samples, factor))

    def _samples(self) -> fx.Node:
        """The number of samples, from a dimension of something received."""
        for leaf, node in self.arrived.items():
            spec = self.flow.spec(leaf)
            for dimension, (size, follows) in enumerate(zip(spec.shape, spec.per_sample)):
                if follows and size % SAMPLES[0] == 0:
                    total, factor = self.graph.call_method("size", (node, dimension)), size // SAMPLES[0]
                    return total if factor == 1 else self.graph.call_function(operator.floordiv, (total, factor))
        raise CannotCut("nothing that crosses tells the number of samples")

    def _leaving(self, leaf: Leaf) -> fx.Node:
        """The tensor *leaf* as it travels."""
        if leaf in self.arrived:
            return self.arrived[leaf]
        name, place = leaf
        paths, _ = tree_flatten_with_path(self.flow.values[name])
        node = key_get(fx.Proxy(self.here[name]), paths[place][0]).node
        if node.op == "get_attr":  # a parameter itself must not be handed on: its owner may free it after the forward pass
            node = self.graph.call_method("clone", (node,))
        return _permuted(node, self.flow.spec(leaf).order)


def _permuted(node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    return node if list(order) == sorted(order) else node.graph.call_method("permute", (node, order))


def _follows(name: str, first: int, second: int) -> bool:
    """Whether a size is proportional to the number of samples; else it is fixed."""
    if first == second:
        return False
    if first * SAMPLES[1] != second * SAMPLES[0]:
        raise CannotCut(f"{name} is of size {first} for {SAMPLES[0]} images and {second} for {SAMPLES[1]}")
    return True
