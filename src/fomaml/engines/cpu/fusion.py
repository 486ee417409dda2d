"""Rewrites a traced meta-gradient for a CPU: channels-last convolutions, and kernels of our own between them.

In the plain loop on a Conv4 half of the time goes to what stands between the convolutions, and most of that to
memory. So batch norm, ReLU and max-pool become one kernel forward and one backward.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node

from fomaml.engines._torch import normalise_batch_norm, schema
from fomaml.engines.cpu.kernels import (
    NAMES,
    channels_last,
    misread,
    norm_relu_pool,
    norm_relu_pool_backward,
    plain,
)
from fomaml.engines.watching import OPERATOR

aten = torch.ops.aten
SAME = (aten.alias.default, aten.detach.default)


def convolutional(graph: Graph) -> bool:
    """Whether there are convolutions of images in a traced function."""
    return any(
        node.target is aten.convolution.default and node.meta["val"].dim() == 4 for node in graph.nodes
    )


def rewrite(module: GraphModule) -> set[int]:
    """Fuse the blocks of a traced function and make its images channels-last, in place.

    Returns the numbers of the arguments that it now takes channels-last. A function that depends on the order of
    its tensors in memory stays as it is.
    """
    graph = module.graph
    for node in graph.nodes:
        normalise_batch_norm(node)
    columns = [node for node in graph.nodes if _is_misread(node)]
    for node in list(graph.nodes):
        if node.target in SAME:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _out_of_place(graph)
    graph.eliminate_dead_code()
    if any(map(keeps_memory, graph.nodes)):
        module.recompile()
        return set()
    for node in graph.nodes:
        block = _block(node)
        if block is not None:
            _fuse(graph, block)
    for node in graph.nodes:
        _forget_moves(node)
        subtract_scaled(node)
    reordered = _channels_last(graph)
    for node in columns:
        _in_plain_order(graph, node)
    reshape_views(graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return reordered


def reshape_views(graph: Graph) -> None:
    """Another order of the pixels may not have the views that were traced."""
    for node in graph.nodes:
        if node.target is aten.view.default:
            node.target = aten.reshape.default


def _out_of_place(graph: Graph) -> None:
    """Make an operation in place, as `nn.ReLU(inplace=True)`, an ordinary one where nothing else sees what it wrote."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not writes(node):
            continue
        written = node.args[0]
        name = schema(node.target).name.split("::")[1]
        ordinary = _of_types(getattr(aten, name.removesuffix("_"), None), node.target)
        tensors = [a for a in node.args if isinstance(a, Node)]
        if (
            ordinary is None
            or not name.endswith("_")
            or written.op != "call_function"
            or is_view(written)
            or any(order[u] > order[node] or (u is not node and is_view(u)) for u in written.users)
            # the result's might be another
            or any(a.meta["val"].dtype != node.meta["val"].dtype for a in tensors)
        ):
            continue
        node.target = ordinary


def _of_types(packet, like):
    """The operator of this name that takes the same arguments and changes none; its overload may have another name."""

    def types(operator) -> list[tuple]:
        return [(argument.type, argument.default_value) for argument in schema(operator).arguments]

    for overload in () if packet is None else packet.overloads():
        found = getattr(packet, overload)
        if types(found) == types(like) and not schema(found).is_mutable:
            return found
    return None


def keeps_memory(node: Node) -> bool:
    """Whether a node writes in place, or what it finds depends on the order of its inputs in memory: weight norm (2.14)
    ignores strides.
    """
    if not isinstance(node.target, OPERATOR):
        return False
    dependent = schema(node.target).name.startswith(("aten::_weight_norm", "aten::linalg", "aten::_linalg"))
    return dependent or node.target is aten.as_strided.default or writes(node)


def writes(node: Node) -> bool:
    """Whether a node changes an argument in place."""
    return isinstance(node.target, OPERATOR) and schema(node.target).is_mutable


def is_view(node: Node) -> bool:
    """Whether a node shares memory with an argument of its."""
    if node.target is operator.getitem:
        return is_view(node.args[0])
    returns = schema(node.target).returns if isinstance(node.target, OPERATOR) else []
    return any(value.alias_info is not None for value in returns)


class _Block(NamedTuple):
    """The nodes of batch norm, ReLU and max-pool, and the last nodes of their derivatives, if there are any."""

    norm: Node
    relu: Node
    pool: Node | None
    slope: Node | None
    backward: Node | None


def _block(norm: Node) -> _Block | None:
    """The block that begins with this batch norm, if nothing else looks inside it."""
    if norm.target is not aten.native_batch_norm.default or norm.meta["val"][0].dim() != 4:
        return None
    inputs, _, _, mean, variance, training, _, _ = norm.args
    statistics = [s for s in (mean, variance) if s is not None]
    if not training or norm.meta["val"][0].dtype not in NAMES or not all(map(_only_moved, statistics)):
        return None
    parts = _parts(norm)
    [relu, *others] = list(parts[0].users) if 0 in parts else [None, None]
    if others or relu.target is not aten.relu.default:
        return None
    pools = [u for u in relu.users if u.target is aten.max_pool2d_with_indices.default]
    passes = [u for u in relu.users if u.target is aten.threshold_backward.default and u.args[1] is relu]
    if len(passes) > 1 or (passes and passes[0].args[2] != 0):
        return None
    backward = slope = None
    if passes:
        backward = _only_user(passes[0])
        if not _is_backward(backward, passes[0], inputs):
            return None
        slope = passes[0].args[0]
    pool = pools[0] if len(pools) == 1 and _halves(pools[0]) else None
    if pool is not None:
        spread = [u for u in relu.users if u.target is aten.max_pool2d_with_indices_backward.default]
        inside = {pool, *passes, *spread}
        seen = set(relu.users) != inside or _indices_used(pool, spread)
        if seen or [slope] != (spread or [None]) or (spread and set(spread[0].users) != set(passes)):
            pool = None
        elif spread:
            slope = spread[0].args[0]
    return _Block(norm, relu, pool, slope, backward)


def _fuse(graph: Graph, block: _Block) -> None:
    norm, relu, pool, slope, backward = block
    inputs, gamma, beta, *_, eps = norm.args
    with graph.inserting_after(norm):
        fused = graph.call_function(norm_relu_pool, (inputs, gamma, beta, eps, pool is not None))
    with graph.inserting_after(fused):
        outputs, *kept = [graph.call_function(operator.getitem, (fused, i)) for i in range(5)]
    last = relu if pool is None else _parts(pool)[0]
    outputs.meta["val"] = last.meta["val"]
    if backward is not None:
        with graph.inserting_before(backward):
            # into the place of the convolution's outputs, if nothing else reads them: fresh pages cost more than sums
            ours = inputs.target is aten.convolution.default and set(inputs.users) <= {norm, backward, fused}
            arguments = (slope, outputs, *kept, gamma, pool is not None, ours)
            derivatives = graph.call_function(norm_relu_pool_backward, arguments)
        backward.replace_all_uses_with(derivatives)
    last.replace_all_uses_with(outputs, delete_user_cb=lambda user: user is not fused)
    for number, statistics in _parts(norm).items():
        if number:  # mean and 1 / deviation, which others may read too
            kept[number + 1].meta["val"] = statistics.meta["val"]
            statistics.replace_all_uses_with(kept[number + 1])


def _channels_last(graph: Graph) -> set[int]:
    """Reorder what goes into convolutions from outside; all else keeps the order of its inputs.

    Returns the numbers of the arguments that are to be given so; views of arguments are reordered in the graph.
    """
    numbers = {node: i for i, node in enumerate(n for n in graph.nodes if n.op == "placeholder")}
    found, done = set(), set()
    for node in [node for node in graph.nodes if node.target is aten.convolution.default]:
        for argument in node.args[:2]:
            if argument in done or argument.meta["val"].dim() != 4:
                continue
            done.add(argument)
            if argument in numbers:
                found.add(numbers[argument])
            elif argument.target is aten.select.int and argument.args[0] in numbers:
                with graph.inserting_after(argument):
                    ordered = graph.call_function(channels_last, (argument,))
                ordered.meta["val"] = argument.meta["val"]
                argument.replace_all_uses_with(
                    ordered, delete_user_cb=lambda user, new=ordered: user is not new
                )
    return found


def _is_misread(node: Node) -> bool:
    """Whether torch may make garbage of a node's convolution, which the derivative of a transposed one has inside."""
    if node.target is aten.convolution.default:
        return misread(node.args[0].meta["val"].shape, node.meta["val"].shape)
    if node.target is aten.convolution_backward.default and node.args[7]:
        return misread(node.args[0].meta["val"].shape, node.args[1].meta["val"].shape)
    return False


def _in_plain_order(graph: Graph, node: Node) -> None:
    """Give a convolution or its derivative its images and weights in the ordinary order of memory."""
    number = 2 if node.target is aten.convolution.default else 3
    with graph.inserting_before(node):
        ordered = [graph.call_function(plain, (argument,)) for argument in node.args[:number]]
    node.args = (*ordered, *node.args[number:])


def _forget_moves(norm: Node) -> None:
    """A batch norm whose running statistics nothing reads need not move them; vmap does not take those that do."""
    if _trains(norm) and all(s is None or _only_moved(s) for s in norm.args[3:5]):
        norm.args = (*norm.args[:3], None, None, *norm.args[5:])


def subtract_scaled(node: Node) -> None:
    """φ - α g as one operation, which takes no numbers of other types."""
    if node.target is not aten.sub.Tensor or node.kwargs:
        return
    left, right = node.args
    if getattr(right, "target", None) is not aten.mul.Tensor or not isinstance(right.args[1], float | int):
        return
    if right.args[0].meta["val"].dtype == node.meta["val"].dtype and node.meta["val"].is_floating_point():
        node.args, node.kwargs = (left, right.args[0]), {"alpha": right.args[1]}


def _parts(node: Node) -> dict[int, Node]:
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_backward(node: Node | None, slope: Node, inputs: Node) -> bool:
    """Whether this is the derivative of the batch norm with these inputs."""
    if node is None or node.target is not aten.native_batch_norm_backward.default:
        return False
    return node.args[0] is slope and node.args[1] is inputs and node.args[7]


def _halves(pool: Node) -> bool:
    """Whether a max-pool is of 2×2 windows that touch."""
    _, kernel, stride, padding, dilation, ceil = (
        *pool.args,
        *([], [0, 0], [1, 1], False)[len(pool.args) - 2 :],
    )
    stride = stride or kernel
    return (
        [*kernel] == [*stride] == [2, 2] and not any(padding) and all(d == 1 for d in dilation) and not ceil
    )


def _indices_used(pool: Node, spread: list[Node]) -> bool:
    indices = _parts(pool).get(1)
    return indices is not None and set(indices.users) != set(spread)


def _only_moved(statistics: Node) -> bool:
    """Whether running statistics are nothing but moved by batch norms that do not read them."""
    return all(map(_trains, statistics.users))


def _trains(node: Node) -> bool:
    """Whether this is a batch norm by the statistics of the batch, or the derivative of one."""
    place = {aten.native_batch_norm.default: 5, aten.native_batch_norm_backward.default: 7}.get(node.target)
    return place is not None and bool(node.args[place])
