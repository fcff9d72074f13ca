"""Compiled graphs as their memory: which buffers a graph's kernels make, and when they die, on fake tensors.

torch.compile runs for real up to the code generator: dynamo, AOTAutograd, inductor's decompositions and its min-cut
partitioner, which decides what the backward pass finds saved and what it computes again. In the generator's place
stands `Program`, which allocates the buffers that the kernels would, by inductor's own rules for fusing:

- a pointwise result is part of the kernels that read it and never in memory, unless an external kernel (a matrix
  product, attention) or the caller needs it, or several kernels would read many buffers to compute it anew;
- a reduction makes a buffer; what it reads is fused into it;
- a fused kernel writes in place over a buffer of the same size that dies with it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor
from torch._inductor.compile_fx import partition_fn
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_leaves, tree_map

from .timeline import CPU_ATTENTION_BACKWARD, Timeline, attention_workspace

aten = torch.ops.aten
# Fused like pointwise operations, though torch does not tag them so: gathers, pastes, constants.
_POINTWISE = {
    *(aten.embedding, aten.index, aten.gather, aten.select_scatter, aten.slice_scatter, aten.constant_pad_nd),
    *(aten.full, aten.full_like, aten.scalar_tensor, aten.arange, aten.clone, torch.ops.prims.iota),
    *(torch.ops.prims.inductor_random, torch.ops.prims.inductor_seed, torch.ops.prims.inductor_lookup_seed),
}
# Computed by generated kernels that can read unwritten (fused) values, into a buffer of their own.
_REDUCTIONS = {aten.sum, aten.mean, aten.var, aten.var_mean, aten.amax, aten.amin, aten.any, aten.prod, aten.cat}


def simulating_backend(timeline: Timeline, parameter_shapes: set[torch.Size]) -> Callable[..., Any]:
    """A backend for torch.compile whose programs only allocate.

    Args:
        timeline: is told of gradients and of the working memory of kernels.
        parameter_shapes: tells gradients of parameters from those of activations.
    """

    def forward(graph: fx.GraphModule, inputs: Any) -> Program:
        return Program(graph, timeline, set())

    def backward(graph: fx.GraphModule, inputs: Any) -> Program:
        return Program(graph, timeline, parameter_shapes)

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=forward, bw_compiler=backward, partition_fn=_partition, decompositions=select_decomp_table()
    )
    return backend


def _partition(graph: fx.GraphModule, inputs: Any, **options: Any) -> Any:
    with V.set_fake_mode(detect_fake_mode(inputs)):  # as inductor does around all of its work
        return partition_fn(graph, inputs, **options)


class Program:
    """One compiled graph. Calling it allocates and frees what its kernels would, and returns its outputs.

    Args:
        graph: as inductor would get it.
        timeline: see `simulating_backend`.
        gradient_shapes: outputs of these shapes are gradients of parameters.
    """

    def __init__(self, graph: fx.GraphModule, timeline: Timeline, gradient_shapes: set[torch.Size]) -> None:
        self._boxed_call = True  # the caller gives a list of inputs, which is emptied so that they can die inside
        self._nodes = list(graph.graph.nodes)
        self._timeline = timeline
        outputs = self._nodes[-1].args[0]
        assert isinstance(outputs, (list, tuple))
        self._outputs = list(outputs)
        self._gradients = {
            node
            for node in self._outputs
            if isinstance(node, fx.Node) and _sizes(node) and _sizes(node)[0].shape in gradient_shapes
        }
        self._plan()

    def _plan(self) -> None:
        """Choose the nodes that are in memory, what each of their kernels reads, and who reads a buffer last."""
        in_memory = {_base(n) for n in self._outputs if isinstance(n, fx.Node)}
        for node in self._nodes:
            if _is_external(node):
                in_memory |= {_base(n) for n in node.all_input_nodes}
        reads: dict[fx.Node, frozenset[fx.Node]] = {}  # the buffers that a node's value is computed from
        self._reads: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self._nodes:
            inputs = frozenset[fx.Node]().union(*(reads[n] for n in node.all_input_nodes))
            if node.op == "placeholder":
                reads[node] = frozenset([node])
            elif node.op == "output" or not _makes_tensors(node):
                reads[node] = frozenset()
            elif _is_view(node):
                reads[node] = inputs
            elif node in in_memory or not _is_pointwise(node) or _is_costly(node, len(inputs)):
                self._reads[node] = inputs
                reads[node] = frozenset([node])
            else:
                reads[node] = inputs
        outputs = frozenset[fx.Node]().union(*(reads[n] for n in self._outputs if isinstance(n, fx.Node)))
        last: dict[fx.Node, fx.Node] = {}
        for node, buffers in self._reads.items():
            last[node] = node  # what nobody reads dies at once
            last |= dict.fromkeys(buffers, node)
        self._dying: dict[fx.Node, list[fx.Node]] = {}
        for buffer, node in last.items():
            if buffer not in outputs:
                self._dying.setdefault(node, []).append(buffer)
        self._unread = [n for n in self._nodes if n.op == "placeholder" and n not in last and n not in outputs]

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """Outputs of inputs; see the class."""
        places = (node for node in self._nodes if node.op == "placeholder")
        live: dict[fx.Node, Any] = dict(zip(places, inputs, strict=True))
        inputs.clear()
        for node in self._unread:
            del live[node]
        for node in self._reads:
            dying = self._dying.get(node, [])
            if not _is_external(node):
                self._write_in_place(node, dying, live)
            live[node] = tree_map(_allocate, _value(node))
            if node.target is CPU_ATTENTION_BACKWARD:
                self._timeline.work(attention_workspace(_value(node.args[1])))  # type: ignore[arg-type]
            if node in self._gradients:
                self._timeline.is_gradient(live[node])
            for buffer in dying:
                live.pop(buffer, None)
        return [self._output(node, live) for node in self._outputs]

    def _write_in_place(self, node: fx.Node, dying: list[fx.Node], live: dict[fx.Node, Any]) -> None:
        size = _bytes(node)
        for buffer in dying:
            if buffer is not node and buffer.op != "placeholder" and _bytes(buffer) == size:
                del live[buffer]
                return

    def _output(self, node: Any, live: dict[fx.Node, Any]) -> Any:
        if not isinstance(node, fx.Node):
            return node
        base = _base(node)
        if node is base:
            return live[base]
        value, source = node.meta["val"], live[base]
        for index in _path(node):
            source = source[index]
        if not isinstance(value, Tensor) or (source.shape == value.shape and source.stride() == value.stride()):
            return source
        # The same storage seen otherwise; bounds are of no concern where there is no memory.
        return source.as_strided(value.shape, value.stride()) if source.numel() >= value.numel() else _allocate(value)


def _allocate(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not _is_static(value):
        return torch.empty(0)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def _is_static(value: Tensor) -> bool:
    """All but the saved state of a random generator, which is on the host and whose size the graph does not know."""
    return all(isinstance(size, int) for size in value.shape)


def _value(node: fx.Node) -> Any:
    """The fake value of a node, or of what is read off it (a kernel with its random state has none itself)."""
    if "val" in node.meta:
        return node.meta["val"]
    return {user.args[1]: _value(user) for user in node.users if user.target is operator.getitem}


def _sizes(node: fx.Node) -> list[Tensor]:
    """The tensors that a node makes, as far as they are of known size."""
    return [v for v in tree_leaves(_value(node)) if isinstance(v, Tensor) and _is_static(v)]


def _bytes(node: fx.Node) -> int:
    return sum(v.numel() * v.element_size() for v in _sizes(node))


def _makes_tensors(node: fx.Node) -> bool:
    return any(isinstance(v, Tensor) for v in tree_leaves(_value(node)))


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _is_pointwise(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or _packet(node) in _POINTWISE


def _is_external(node: fx.Node) -> bool:
    """Whether a library's kernel computes it, which reads and writes memory."""
    if node.op != "call_function" or _is_view(node) or not _makes_tensors(node):
        return False
    return not _is_pointwise(node) and _packet(node) not in _REDUCTIONS


def _is_costly(node: fx.Node, reads: int) -> bool:
    """Whether inductor writes a pointwise result rather than compute it anew in every kernel that reads it."""
    # Newer torch sets it by the device, and keeps that of a GPU under another name.
    if reads > (inductor.realize_acc_reads_threshold or inductor._realize_acc_reads_threshold_default):
        return True
    return len(node.users) > 1 and reads > inductor.realize_reads_threshold


def _base(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while node.op == "call_function" and _is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _path(node: fx.Node) -> list[Any]:
    """The places, from outside to inside, at which a view's base returns what the view shows."""
    path: list[Any] = []
    while node.op == "call_function" and _is_view(node) and node.all_input_nodes:
        path = [node.args[1], *path] if node.target is operator.getitem else []
        node = node.all_input_nodes[0]
    return path
