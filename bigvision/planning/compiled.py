"""Compiled blocks without a compiler: what torch.compile keeps for the backward pass, and which values get memory.

dynamo traces each kind of block, and AOTAutograd decomposes it and divides it into a forward and a backward graph as it does
for inductor, by the cut that keeps the least. The graphs then run operation by operation, without values. What inductor would
fuse into the kernel that reads it is not counted.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state
from torch.overrides import _pop_mode_temporarily

from bigvision.models import kinds, share_rates
from bigvision.models.tracing import FusedAttention

REDUCTIONS = {"sum", "mean", "var_mean", "var", "amax", "amin", "max", "min", "any", "all", "argmax", "linalg_vector_norm"}
"""Operations into which inductor fuses what they read, beside pointwise ones."""
COPIES = {"_to_copy", "clone", "convert_element_type", "full", "full_like", "empty", "expand", "cat", "copy", "constant_pad_nd",
          "slice_scatter", "select_scatter", "iota", "scalar_tensor"}  # fmt: skip
"""Others that inductor computes where they are read."""

AGAIN = "bigvision_again"
"""Whether a node of a backward graph computes again what the forward pass has computed."""


def compile_without_code(blocks: Sequence[nn.Module], attention: FusedAttention, recomputed: bool) -> None:
    """Let each of *blocks* do, in place, what its compiled form would do. Blocks of one kind share a trace.

    *recomputed*: what the backward graph has of the forward pass is counted as recompute.
    """
    import torch._dynamo
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def partition(*args: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        forward, backward = min_cut_rematerialization_partition(*args, compiler="inductor", **kwargs)
        # What is computed again keeps its name, or is wrapped where it is random.
        names = {node.name for node in forward.graph.nodes if node.op == "call_function"}
        for node in backward.graph.nodes if recomputed else ():
            node.meta[AGAIN] = node.op == "call_function" and (node.name in names or node.target is run_with_rng_state)
        return forward, backward

    def run(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        return _Unfused(graph, attention).boxed

    compiled = aot_autograd(fw_compiler=run, bw_compiler=run, decompositions=select_decomp_table(), partition_fn=partition)

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            return compiled(graph, inputs)
        except AttributeError:
            # The decomposition of pooling takes it for imported. That takes half a second, and most models do without.
            importlib.import_module("torch._inductor.lowering")
            return compiled(graph, inputs)

    groups = kinds(blocks)
    for group in groups:
        share_rates(group, torch.device("cpu"))
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 16 * len(groups))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, dynamo.recompile_limit)
    for block in blocks:
        block.forward = functools.partial(_outside, torch.compile(block.forward, backend=backend, dynamic=False))


def _outside(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with _pop_mode_temporarily():
        return forward(*args, **kwargs)


class _Unfused(fx.Interpreter):
    """Runs a graph, and tells the recorder which values get no memory."""

    def __init__(self, graph: fx.GraphModule, attention: FusedAttention) -> None:
        super().__init__(graph)
        self.attention = attention
        self.fused = {node for node in graph.graph.nodes if _computed_where_read(node) and all(map(_reads, _readers(node)))}
        self.boxed: Callable[[list[Any]], Any] = lambda inputs: self.boxed_run(inputs)
        vars(self.boxed)["_boxed_call"] = True

    def run_node(self, n: fx.Node) -> Any:
        recorder: Any = self.attention.counter
        recorder.fused = n in self.fused
        try:
            with recorder.recomputing() if n.meta.get(AGAIN) else nullcontext():
                return super().run_node(n)
        finally:
            recorder.fused = False

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Random operations that a backward pass computes again keep the generator's state, on CUDA in the generator itself."""
        if target is run_and_save_rng_state:
            operation, *given = args
            size = torch.get_rng_state().numel() if self.attention.device == "cpu" else 0
            return torch.empty(size, dtype=torch.uint8), operation(*given, **kwargs)
        if target is run_with_rng_state:
            _, operation, *given = args
            return operation(*given, **kwargs)
        return super().call_function(target, args, kwargs)


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "_overloadpacket", node.target)).rpartition(".")[2]


def _computed_where_read(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and (torch.Tag.pointwise in tags or _name(node) in COPIES)


def _reads(node: fx.Node) -> bool:
    """Whether the kernel of *node* can compute what it reads itself."""
    return _computed_where_read(node) or _name(node) in REDUCTIONS


def _readers(node: fx.Node) -> list[fx.Node]:
    """The operations that read the value of *node*, also through views."""
    found: list[fx.Node] = []
    for user in node.users:
        view = user.op == "call_function" and getattr(user.target, "is_view", False)
        found += _readers(user) if view else [user]
    return found
