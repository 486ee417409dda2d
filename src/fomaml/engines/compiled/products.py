"""Rewrites batched matrix products of a traced meta-gradient that are one product in truth.

In the first inner step all tasks share their weights, and the meta-gradient of a weight is a sum over tasks: either
way one large product does what many small ones did, and no stack of results is written.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from fomaml.engines.cpu import fusion
from fomaml.engines.cpu.fusion import writes

aten = torch.ops.aten


def rewrite(module: GraphModule) -> None:
    """Replace such products in a traced function, in place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.target is aten.bmm.default:
            _shared(graph, node)
        elif node.target is aten.sum.dim_IntList:
            _summed(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def call_less(module: GraphModule) -> None:
    """Leave out calls of a traced function of dense layers, in place: views of what is in that shape already, products
    with a step size. φ - α (δᵀ a) is one operation, which goes over the memory of φ once, and in it where φ is not
    needed again.
    """
    graph = module.graph
    if any(map(writes, graph.nodes)):
        return
    for node in list(graph.nodes):
        same = _same_as(node)
        if same is not None:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    for node in graph.nodes:
        fusion.subtract_scaled(node)
    graph.eliminate_dead_code()
    own: set[Node] = set()
    for node in list(graph.nodes):
        if node.target is aten.sub.Tensor and len(node.args) == 2 and isinstance(node.args[1], Node):
            _add_product(graph, node, own)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _add_product(graph: Graph, node: Node, own: set[Node]) -> None:
    """Make a difference one of `addmm` where a product is subtracted. own: the results of such, shared by nothing."""
    start, product = node.args
    turned = product.target is aten.t.default
    inner = product.args[0] if turned else product
    single = len(product.users) == 1 and len(inner.users) == 1
    if not (isinstance(start, Node) and inner.target is aten.mm.default and single):
        return
    if not _value(node).shape == _value(start).shape == _value(product).shape:
        return
    left, right = inner.args
    order = {each: number for number, each in enumerate(graph.nodes)}
    spent = start in own and all(order[user] <= order[node] for user in _readers(start))
    with graph.inserting_before(node):
        if turned:
            left, right = _call(graph, aten.t.default, right), _call(graph, aten.t.default, left)
        operator = aten.addmm_.default if spent else aten.addmm.default
        added = graph.call_function(operator, (start, left, right), {"alpha": -node.kwargs.get("alpha", 1)})
    added.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(added)
    own.add(added)


def _readers(node: Node) -> set[Node]:
    """Who uses a node, or what may share its memory."""
    found = set(node.users)
    for user in node.users:
        if fusion.is_view(user):
            found |= _readers(user)
    return found


def _same_as(node: Node) -> Node | None:
    """The node that another one gives as it is."""
    if node.target in fusion.SAME:
        return node.args[0]
    if node.target is aten.t.default and node.args[0].target is aten.t.default:
        return node.args[0].args[0]
    if node.target not in (aten.view.default, aten._unsafe_view.default, aten.expand.default):
        return None
    now, then = node.meta["val"], node.args[0].meta["val"]
    return node.args[0] if now.shape == then.shape and now.stride() == then.stride() else None


def operations(graph: Graph) -> int:
    """About how many numbers a traced function computes: two for each product of two, one for each other result."""
    found = 0
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, Tensor):
            factor = _FACTORS.get(node.target)
            found += value.numel() * (1 if factor is None else 2 * _value(node.args[factor]).shape[-1])
    return found


_FACTORS = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}


def _shared(graph: Graph, product: Node) -> None:
    """(tasks, rows, in) times one matrix for all tasks."""
    left, right = product.args
    value, weight = _value(left), _value(right)
    if weight.shape[0] == 1 or weight.stride(0) != 0 or not value.is_contiguous():
        return
    rows = value.shape[0] * value.shape[1]
    with graph.inserting_before(product):
        flat = _call(graph, aten.view.default, left, [rows, value.shape[2]])
        matrix = _call(graph, aten.select.int, right, 0, 0)
        result = _call(graph, aten.mm.default, flat, matrix)
        result = _call(graph, aten.view.default, result, list(_value(product).shape))
    product.replace_all_uses_with(result)


def _summed(graph: Graph, total: Node) -> None:
    """The sum over tasks of products (tasks, out, rows) times (tasks, rows, in)."""
    if list(total.args[1]) != [0] or total.kwargs:
        return
    turned, product = False, total.args[0]
    while product.target in (aten.view.default, aten.transpose.int) and len(product.users) == 1:
        if product.target is aten.transpose.int:
            if {axis % 3 for axis in product.args[1:]} != {1, 2}:
                return
            turned = not turned
        elif _value(product).shape != _value(product.args[0]).shape:
            return
        product = product.args[0]
    if product.target is not aten.bmm.default or len(product.users) != 1:
        return
    left, right = product.args
    columns, value = _value(left).mT, _value(right)
    if not columns.is_contiguous() or not value.is_contiguous():
        return
    with graph.inserting_before(total):
        flipped = _call(graph, aten.transpose.int, left, 1, 2)
        left = _call(graph, aten.view.default, flipped, [prod(columns.shape[:2]), columns.shape[2]])
        right = _call(graph, aten.view.default, right, [prod(value.shape[:2]), value.shape[2]])
        first, second = (right, left) if turned else (left, right)
        result = _call(graph, aten.mm.default, _call(graph, aten.t.default, first), second)
        result = _call(graph, aten.view.default, result, list(_value(total).shape))
    total.replace_all_uses_with(result)


def _call(graph: Graph, operator, *arguments) -> Node:
    """A node, with what it gives in its meta data as for a traced one."""
    node = graph.call_function(operator, arguments)
    node.meta["val"] = operator(*(_value(a) if isinstance(a, Node) else a for a in arguments))
    return node


def _value(node: Node) -> Tensor:
    """What a node gives, without data: its shape and strides."""
    value = node.meta["val"]
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
