"""A traced meta-gradient of one task, made one of a stack of tasks whose kernels go through them one by one.

vmap makes one grouped convolution of the tasks' convolutions, slow on a CPU. Here it goes over the graph that
`fusion.py` has rewritten, and convolutions and blocks become calls of the kernels: a fraction of the calls of a loop,
which hold small tasks up.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from fomaml.engines import _torch
from fomaml.engines.cpu import fusion, kernels

aten = torch.ops.aten
ALONE = 5_000  # pixels of the outputs of a task that comes alone, see `kernels.PIXELS`
# operations of a convolution, on average, from which on two threads are faster than one: 7 million take as long, 25
# million 0.94 of the time, 33 million 0.9
SHARED = 20_000_000


def lift(module: GraphModule, inputs: Sequence[Tensor], shared: int, summed: int, tasks: int) -> GraphModule:
    """The rewritten function of one task as a function of `tasks` of them.

    inputs: of the function of one task. shared: so many of them, the first, are the same for all tasks; the others and
    the results have a leading axis of length one. summed: so many of the results, the first, are summed over tasks.

    Raises:
        RuntimeError: vmap does not take something in it, it writes in place, or its results depend on the order of
            numbers in memory.
    """
    if any(map(fusion.keeps_memory, module.graph.nodes)):
        raise RuntimeError("the function writes in place, or depends on the order of numbers in memory")

    def lifted(*arguments: Tensor) -> list[Tensor]:
        def alone(*examples: Tensor) -> list[Tensor]:
            own = (example[None] for example in examples)
            return list(_Interpreter(module).run(*arguments[:shared], *own, enable_io_processing=False))

        found = torch.vmap(alone)(*arguments[shared:])
        return [*(each.sum(0) for each in found[:summed]), *(each.flatten(0, 1) for each in found[summed:])]

    stacks = [example.expand(tasks, *example.shape[1:]).contiguous() for example in inputs[shared:]]
    result = _torch.trace(lifted, *inputs[:shared], *stacks)
    functions = {getattr(torch.ops.fomaml, own.__name__).default: own for _, own in _OPERATORS.values()}
    for node in result.graph.nodes:
        node.target = functions.get(node.target, node.target)
    fusion.reshape_views(result.graph)
    _erase_identities(result.graph)
    _sum_together(result.graph)
    _subtract_together(result.graph)
    result.graph.eliminate_dead_code()
    result.graph.lint()
    result.recompile()
    return result


def by_kernels(module: GraphModule) -> bool:
    """Give the small convolutions of the rewritten function of one task to the kernels, in place: what is around
    torch's own takes longer. Whether sharing them out to several threads takes less time than one thread.
    """
    operations = [
        2 * node.meta["val"].numel() * node.args[1].meta["val"][0].numel()
        for node in module.graph.nodes
        if node.target is aten.convolution.default
    ]
    for node in module.graph.nodes:
        if node.target is aten.convolution.default and _suits(node.args[:2], node.args[3:]):
            node.target, node.args = kernels.convolution, node.args[:5]
        elif node.target is aten.convolution_backward.default:
            images, kind, mask = node.args[1:3], node.args[4:10], node.args[10]
            if _suits(images, kind) and (not mask[0] or _suits(images, kind, by_inputs=True)):
                node.target = kernels.convolution_backward
                node.args = (*node.args[:3], *node.args[4:6], mask)
    module.recompile()
    return sum(operations) > SHARED * len(operations)


def _suits(given: Any, kind: Any, by_inputs: bool = False) -> bool:
    images, kernel = (node.meta["val"] for node in given)
    return images.dim() == 4 and _takes(images[None], kernel[None], kind, by_inputs, ALONE)


def _erase_identities(graph: Graph) -> None:
    """Axes moved to where they are."""
    for node in list(graph.nodes):
        if node.target is aten.permute.default and [*node.args[1]] == [*range(len(node.args[1]))]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _sum_together(graph: Graph) -> None:
    """The sums over tasks that are results as one call."""
    [results] = graph.output_node().args
    found = [
        node
        for node in dict.fromkeys(results)
        if node.target is aten.sum.dim_IntList and node.args[1:] == ([0],)
    ]
    if found:
        with graph.inserting_before(graph.output_node()):
            _call_together(graph, kernels.sums, found, ([node.args[0] for node in found],))


def _subtract_together(graph: Graph) -> None:
    """Runs of φ - α g as one call each."""
    run: list[Node] = []
    for node in list(graph.nodes):
        tensors = all(isinstance(argument, Node) for argument in node.args)
        steps = node.target is aten.sub.Tensor and "alpha" in node.kwargs and tensors
        if run and (
            any(argument in run for argument in node.all_input_nodes)
            or (steps and node.kwargs != run[0].kwargs)
        ):
            _subtract_run(graph, run)
            run = []
        if steps:
            run.append(node)
    _subtract_run(graph, run)


def _subtract_run(graph: Graph, run: list[Node]) -> None:
    if run:
        lefts, rights = map(list, zip(*(node.args for node in run)))
        with graph.inserting_after(run[-1]):
            _call_together(graph, kernels.subtract, run, (lefts, rights, run[0].kwargs["alpha"]))


def _call_together(graph: Graph, function: Callable, nodes: list[Node], arguments: tuple) -> None:
    """What several nodes do, by one call that gives a list."""
    found = graph.call_function(function, arguments)
    with graph.inserting_after(found):
        for i, node in reversed([*enumerate(nodes)]):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (found, i)))


class _Interpreter(Interpreter):
    """Calls operators that vmap knows how to stack in the place of kernels and convolutions."""

    def call_function(self, target, args, kwargs):
        if target in (kernels.channels_last, kernels.plain):
            return args[0]
        convolutions = (aten.convolution.default, aten.convolution_backward.default)
        if target in convolutions and args[1].dim() != 4:  # not of images
            return super().call_function(target, args, kwargs)
        if target is aten.convolution_backward.default:
            slope, inputs, weights, _, *kind, mask = args
            first = _OPERATORS[by_inputs][0](slope, inputs, weights, *kind) if mask[0] else None
            if not any(mask[1:]):
                return first, None, None
            return first, *_OPERATORS[by_weights][0](slope, inputs, weights, *kind)
        target = _OPERATORS[target][0] if target in _OPERATORS else target
        return super().call_function(target, args, kwargs)


def convolution(inputs: Tensor, weights: Tensor, bias: Tensor | None, *kind) -> Tensor:
    """`aten.convolution` of each task, kind its arguments from stride on; weights and bias of each or of all."""
    if _takes(inputs, weights, kind):
        return kernels.convolution(inputs, weights, bias, *kind[:2])
    order = kernels.channels_last
    if inputs.shape[2] == 1:
        outputs = _like_convolution(inputs.to("meta"), weights.to("meta"), None, *kind)
        order = _order(inputs, outputs)
    alone = [
        aten.convolution(
            image, weight, None if bias is None else bias[task if bias.dim() == 2 else ...], *kind
        )
        for task, (image, weight) in enumerate(_pairs(inputs, weights, order))
    ]
    return _stack(alone)


def by_inputs(slope: Tensor, inputs: Tensor, weights: Tensor, *kind) -> Tensor:
    """The derivatives of `convolution` by its inputs."""
    if _takes(inputs, weights, kind, by_inputs=True):
        return kernels.convolution_backward(slope, inputs, weights, *kind[:2], wanted=(True, False, False))[0]
    order = kernels.channels_last
    if kind[3]:  # transposed: a convolution of the slope
        order = _order(slope, inputs)
    return _stack(
        aten.convolution_backward(order(own), *pair, None, *kind, (True, False, False))[0]
        for own, pair in zip(slope, _pairs(inputs, weights, order))
    )


def by_weights(slope: Tensor, inputs: Tensor, weights: Tensor, *kind) -> tuple[Tensor, Tensor]:
    """The derivatives of `convolution` by its weights and its bias, of each task."""
    if _takes(inputs, weights, kind):
        return kernels.convolution_backward(slope, inputs, weights, *kind[:2], wanted=(False, True, True))[1:]
    channels = [slope.shape[2]]
    alone = [
        aten.convolution_backward(kernels.channels_last(own), *pair, channels, *kind, (False, True, True))[1:]
        for own, pair in zip(slope, _pairs(inputs, weights))
    ]
    return _stack([each[0] for each in alone]), torch.stack([each[1] for each in alone])


def _order(inputs: Tensor, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The order of memory in which torch's convolution of such images can be trusted."""
    return kernels.plain if kernels.misread(inputs.shape, outputs.shape) else kernels.channels_last


def _takes(
    inputs: Tensor, weights: Tensor, kind: tuple, by_inputs: bool = False, pixels: int = kernels.PIXELS
) -> bool:
    """Whether the kernels take this convolution."""
    stride, padding, dilation, transposed, _, groups = kind
    is_plain = not transposed and groups == 1 and all(d == 1 for d in dilation)
    return is_plain and kernels.takes(inputs, weights, stride, padding, by_inputs, pixels)


def _pairs(inputs: Tensor, weights: Tensor, order: Callable[[Tensor], Tensor] = kernels.channels_last):
    """Each task's images and weights, in this order of memory."""
    weights = weights if weights.dim() == inputs.dim() else weights.expand(len(inputs), *weights.shape)
    return ((order(image), order(weight)) for image, weight in zip(inputs, weights))


def _stack(images) -> Tensor:
    """Stacked, channels-last."""
    return torch.stack([own.movedim(-3, -1).contiguous() for own in images]).movedim(-1, -3)


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Without data, channels-last as what the kernels give."""
    return kernels.in_order(like.new_empty(shape))


def _like_convolution(inputs, weights, bias, *kind) -> Tensor:
    weight = weights[0] if weights.dim() == inputs.dim() else weights
    alone = aten.convolution(inputs[0], weight, None, *kind)
    return _empty(inputs, (len(inputs), *alone.shape))


def _like_by_inputs(slope, inputs, weights, *kind) -> Tensor:
    return _empty(inputs, inputs.shape)


def _like_by_weights(slope, inputs, weights, *kind) -> tuple[Tensor, Tensor]:
    return _empty(inputs, (len(inputs), *weights.shape[-4:])), slope.new_empty(slope.shape[0], slope.shape[2])


def _like_norm(inputs, gamma, beta, eps, pool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tasks, images, channels, height, width = inputs.shape
    shape = (tasks, images, channels, height // 2, width // 2) if pool else inputs.shape
    vector = (tasks, channels)
    return (
        *(_empty(inputs, size) for size in (shape, inputs.shape, shape)),
        inputs.new_empty(vector),
        inputs.new_empty(vector),
    )


def _like_norm_backward(slope, outputs, inputs, won, mean, deviation, gamma, pool, overwrite):
    return _empty(inputs, inputs.shape), torch.empty_like(mean), torch.empty_like(mean)


def _operator(function: Callable, like: Callable, stacked: int, types: str):
    """An operator that `torch.vmap` stacks: its first so many arguments always, other tensors where they differ.

    like: what it gives, without data. Never run by itself: `lift` puts the function in its place.
    """
    made = torch.library.custom_op(f"fomaml::{function.__name__}", function, mutates_args=(), schema=types)

    @made.register_fake
    def without_data(first, *others):
        if first.dim() != 5:
            raise RuntimeError(f"{function.__name__}: images that are the same for all tasks")
        return like(first, *others)

    def rule(info, axes, *arguments):
        arguments = [
            argument.movedim(axis, 0) if isinstance(argument, Tensor) and axis is not None else argument
            for argument, axis in zip(arguments, axes)
        ]
        for i in range(stacked):
            if axes[i] is None:
                arguments[i] = arguments[i].expand(info.batch_size, *arguments[i].shape)
        found = made(*arguments)
        return found, 0 if isinstance(found, Tensor) else (0,) * len(found)

    made.register_vmap(rule)
    return made, function


_KIND = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups"
_OPERATORS = {
    aten.convolution.default: _operator(
        convolution, _like_convolution, 1, f"(Tensor inputs, Tensor weights, Tensor? bias, {_KIND}) -> Tensor"
    ),
    by_inputs: _operator(
        by_inputs, _like_by_inputs, 2, f"(Tensor slope, Tensor inputs, Tensor weights, {_KIND}) -> Tensor"
    ),
    by_weights: _operator(
        by_weights,
        _like_by_weights,
        2,
        f"(Tensor slope, Tensor inputs, Tensor weights, {_KIND}) -> (Tensor, Tensor)",
    ),
    kernels.norm_relu_pool: _operator(
        kernels.norm_relu_pool,
        _like_norm,
        1,
        "(Tensor inputs, Tensor? gamma, Tensor? beta, float eps, bool pool)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    kernels.norm_relu_pool_backward: _operator(
        kernels.norm_relu_pool_backward,
        _like_norm_backward,
        6,
        "(Tensor slope, Tensor outputs, Tensor inputs, Tensor won, Tensor mean, Tensor deviation, Tensor? gamma,"
        " bool pool, bool overwrite) -> (Tensor, Tensor, Tensor)",
    ),
}
