"""The order of products in a compiled backward pass in which what is computed again is soon gone.

The backward pass of a linear layer y = x W has two matrix products, grad_x = grad_y W^T and grad_W = x^T grad_y, and
torch.compile starts with grad_x. Where x is computed again in the backward pass (activation checkpointing, a memory
budget), x and grad_x then exist together, because inductor fuses what makes x with what reads grad_x: for the second
linear layer of a transformer's MLP these are GELU and its derivative, and each of the tensors is the widest of the
layer. With grad_W first, x is gone before grad_x is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


def spending_first() -> dict[str, Any]:
    """Options of inductor that let it compute in this order; none where torch (before 2.9) cannot be told."""
    try:
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
        from torch._inductor.fx_passes.control_dependencies import preserve_node_ordering
        from torch.utils._ordered_set import OrderedSet
    except ImportError:
        return {}

    class SpendFirst(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            waits = waiting(graph.nodes)
            preserve_node_ordering(graph, {node: OrderedSet([first]) for node, first in waits.items()})

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    return {"post_grad_custom_post_pass": SpendFirst()}


def in_order(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes of a graph, those of `waiting` and what needs them moved behind what they wait for."""
    nodes = list(nodes)
    waits = waiting(nodes)
    ordered: list[fx.Node] = []
    done: set[fx.Node] = set()
    for given in nodes:
        places = [given]
        while places:
            node = places[-1]
            first = [waits[node]] if node in waits else []
            needed = [n for n in (*first, *node.all_input_nodes) if n not in done]
            if needed:
                places += needed
                continue
            places.pop()
            if node not in done:
                done.add(node)
                ordered.append(node)
    return ordered


def waiting(nodes: Iterable[fx.Node]) -> Mapping[fx.Node, fx.Node]:
    """Matrix products that should wait, each with the one that should come before it.

    Of two products with one gradient it is the one whose other operand is computed in this graph and is larger than the
    gradient and than the other's operand.

    Args:
        nodes: of the graph of a backward pass, on the level of aten.
    """
    products = [node for node in nodes if node.target is aten.mm.default]
    found = {}
    for first in products:
        (gradient, columns, rows), (operand, _, width) = (_matrix(node) for node in first.args)
        if not all(isinstance(size, int) for size in (columns, rows, width)):  # of a graph for any batch size
            continue
        if columns >= min(rows, width) or operand.op == "placeholder" or operand.target is aten.mm.default:
            continue
        for other in products:
            of_one = _matrix(other.args[0]) == (gradient, rows, columns) and _matrix(other)[1:] == (rows, width)
            if of_one and not _needs(first, other):
                found[other] = first
    return found


def is_view(node: fx.Node) -> bool:
    """Whether a node's operation shows memory of its inputs."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _matrix(node: Any) -> tuple[fx.Node, int, int]:
    """What a matrix is a view of, its rows and its columns."""
    rows, columns = node.meta["val"].shape
    while node.op == "call_function" and is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node, rows, columns


def _needs(node: fx.Node, other: fx.Node) -> bool:
    """Whether a node is computed from another."""
    seen = {node}
    places = [node]
    while places:
        new = [n for n in places.pop().all_input_nodes if n not in seen]
        seen.update(new)
        places += new
    return other in seen
