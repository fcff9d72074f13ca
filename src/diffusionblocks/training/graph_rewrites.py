"""Rewrites of a graph that torch.compile has traced, before it is differentiated: the same function by faster kernels.

They look at a graph's own nodes, so they hold for any class, end to end as in a block, and patch nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from ..layers.fused_mlp import fused_mlp, supported
from ..layers.linear_gelu import linear_gelu
from ..layers.short_attention import is_short, short_attention

#: Products of inputs wider than this are large enough by themselves.
_NARROW = 256

_LINEAR = (torch._C._nn.linear, F.linear)
_ATTENTION = (torch._C._nn.scaled_dot_product_attention, F.scaled_dot_product_attention)
_GELU = (torch._C._nn.gelu, F.gelu)


def rewriting(
    compile_graph: Callable[[fx.GraphModule, Any], Any], names: Collection[str], device_type: str = "cuda"
) -> Callable[[fx.GraphModule, Any], Any]:
    """A backend of torch.compile that rewrites graphs before it gives them to another.

    Args:
        compile_graph: the other backend.
        names: what to rewrite, as in `TrainConfig.fused_kernels`; `gelu` too, where nothing is differentiated.
        device_type: rewrite only what runs there.
    """
    rewrites = {"mlp": fuse_mlps, "projections": merge_projections, "attention": shorten_attention}
    rewrites["gelu"] = join_gelus

    def rewrite_and_compile(graph: fx.GraphModule, inputs: Any) -> Any:
        for part in graph.modules():  # what activation checkpointing computes again is a graph in the graph
            for name, rewrite in rewrites.items():
                if name in names and isinstance(part, fx.GraphModule):
                    rewrite(part, device_type)
        return compile_graph(graph, inputs)

    return rewrite_and_compile


def fuse_mlps(graph: fx.GraphModule, device_type: str = "cuda") -> int:
    """Replace linear, exact GELU, linear in bfloat16 by `fused_mlp`, where that is faster. Returns how many."""
    count = 0
    for second in list(graph.graph.nodes):
        if second.target not in _LINEAR:
            continue
        gelu = second.args[0]
        if not isinstance(gelu, fx.Node) or gelu.target not in _GELU or len(gelu.users) != 1:
            continue
        if gelu.kwargs.get("approximate", "none") != "none":
            continue
        first = gelu.args[0]
        if not isinstance(first, fx.Node) or first.target not in _LINEAR or len(first.users) != 1:
            continue
        (x, w1, b1), (_, w2, b2) = _operands(first), _operands(second)
        if b1 is None or b2 is None or not _lower(first, device_type) or not _lower(second, device_type):
            continue
        (*_, dim), (*_, hidden), (*_, out) = _shape(x), _shape(first), _shape(second)
        if not supported(dim, hidden, out):
            continue
        with graph.graph.inserting_before(second):
            fused = graph.graph.call_function(fused_mlp, (x, w1, b1, w2, b2))
        _replace(second, fused)
        for node in (second, gelu, first):
            graph.graph.erase_node(node)
        count += 1
    if count:
        graph.recompile()
    return count


def join_gelus(graph: fx.GraphModule, device_type: str = "cuda") -> int:
    """Replace linear, GELU in its tanh form, both in bfloat16, by `linear_gelu`: for inference. Returns how many."""
    count = 0
    for gelu in list(graph.graph.nodes):
        if gelu.target not in _GELU or gelu.kwargs.get("approximate", "none") != "tanh":
            continue
        linear = gelu.args[0]
        if not isinstance(linear, fx.Node) or linear.target not in _LINEAR or len(linear.users) != 1:
            continue
        x, weight, bias = _operands(linear)
        # Under autocast the weights are of float32, and cast where they are used.
        if (
            bias is None
            or not _lower(linear, device_type)
            or {_dtype(n) for n in (x, weight, bias)} != {torch.bfloat16}
        ):
            continue
        with graph.graph.inserting_before(gelu):
            joint = graph.graph.call_function(linear_gelu, (x, weight, bias))
        _replace(gelu, joint)
        for node in (gelu, linear):
            graph.graph.erase_node(node)
        count += 1
    if count:
        graph.recompile()
    return count


def merge_projections(graph: fx.GraphModule, device_type: str = "cuda") -> int:
    """Replace products of one narrow input in bfloat16, as query, key and value, by one. Returns how many groups."""
    together: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.graph.nodes:
        if node.target in _LINEAR and _operands(node)[2] is not None and _lower(node, device_type):
            together[_operands(node)[0]].append(node)
    groups = [nodes for x, nodes in together.items() if len(nodes) > 1 and 0 < _shape(x)[-1] <= _NARROW]
    groups = [nodes for nodes in groups if len({_dtype(_operands(node)[1]) for node in nodes}) == 1]
    for nodes in groups:
        sizes = [_shape(node)[-1] for node in nodes]
        x = _operands(nodes[0])[0]
        # Weights that another node makes come before the last of them; what uses the first comes behind it.
        inputs = [operand for node in nodes for operand in _operands(node)[1:]]
        if any(operand.op not in ("placeholder", "get_attr") for operand in inputs):
            continue
        with graph.graph.inserting_before(nodes[0]):
            weight = graph.graph.call_function(torch.cat, ([_operands(node)[1] for node in nodes],))
            bias = graph.graph.call_function(torch.cat, ([_operands(node)[2] for node in nodes],))
            product = graph.graph.call_function(F.linear, (x, weight, bias))
            parts = graph.graph.call_function(torch.split, (product, sizes), {"dim": -1})
            for i, node in enumerate(nodes):
                _replace(node, graph.graph.call_function(_item, (parts, i)))
        for node in nodes:
            graph.graph.erase_node(node)
    if groups:
        graph.recompile()
    return len(groups)


def shorten_attention(graph: fx.GraphModule, device_type: str = "cuda") -> int:
    """Replace attention over few tokens in bfloat16, without a mask, by `short_attention`. Returns how many."""
    count = 0
    for node in list(graph.graph.nodes):
        if node.target not in _ATTENTION or not _lower(node, device_type):
            continue
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        values = dict(zip(names, node.args, strict=False)) | node.kwargs
        q, k, v = (values.pop(name) for name in names[:3])
        dropout, scale = values.pop("dropout_p", 0.0), values.pop("scale", None)
        shape = _shape(q)
        if any(values.values()) or len(shape) != 4 or _shape(k) != shape or _shape(v) != shape:
            continue
        if not is_short(shape[2], shape[3]):
            continue
        with graph.graph.inserting_before(node):
            _replace(node, graph.graph.call_function(short_attention, (q, k, v, dropout, scale)))
        graph.graph.erase_node(node)
        count += 1
    if count:
        graph.recompile()
    return count


def _item(values: Any, index: int) -> Any:
    return values[index]


def _replace(node: fx.Node, by: fx.Node) -> None:
    by.meta.update({name: node.meta[name] for name in ("example_value", "nn_module_stack") if name in node.meta})
    node.replace_all_uses_with(by)


def _operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    """(x, weight, bias) of a linear node."""
    values = dict(zip(("input", "weight", "bias"), linear.args, strict=False)) | linear.kwargs
    return values["input"], values["weight"], values.get("bias")


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node makes; (0,) where it is not known."""
    return tuple(getattr(node.meta.get("example_value"), "shape", (0,)))


def _dtype(node: fx.Node) -> Any:
    return getattr(node.meta.get("example_value"), "dtype", None)


def _lower(node: fx.Node, device_type: str) -> bool:
    """Whether a node computes in bfloat16 on that kind of device, of sizes that are known."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or any(not isinstance(size, int) for size in value.shape):
        return False
    return value.dtype == torch.bfloat16 and value.device.type == device_type
